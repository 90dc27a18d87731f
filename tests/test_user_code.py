"""Functions that a config names."""

import pytest

from jaxalign import user_code

SOURCE = "def by_length(rows, step):\n    return [float(len(row['text'])) for row in rows]\n"


def test_a_function_of_a_file_beside_the_config(tmp_path, monkeypatch):
    (tmp_path / "weights.py").write_text(SOURCE)
    name = user_code.beside("weights.by_length", tmp_path)
    monkeypatch.chdir("/")
    assert user_code.load(name)([{"text": "abc"}], 0) == [3.0]
    assert user_code.beside(name, tmp_path) == name
    assert user_code.beside("json.loads", tmp_path) == "json.loads"
    assert user_code.load("json.loads")("1") == 1


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "weights.py").write_text(SOURCE)
    with pytest.raises(ValueError, match="no function 'by_lenght'; did you mean 'by_length'"):
        user_code.load(f"{tmp_path}/weights.py:by_lenght")
    with pytest.raises(ValueError, match="there is no file"):
        user_code.load(f"{tmp_path}/other.py:by_length")
    with pytest.raises(ValueError, match="no module 'no_such'"):
        user_code.load("no_such.function")
