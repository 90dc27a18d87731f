"""`python -m jaxalign.preview`: counts that can be checked by hand, and no weights read."""

import io
import json
import shutil

import numpy as np
import pytest
from common import load_tokenizer, policy

from jaxalign import preview as preview_lib
from jaxalign.data.sources import prepare

POLICY = policy("llama")
ROWS = [
    {"prompt": f"cloud teach {i} ", "chosen": "glass " * (1 + i % 7) + "end", "rejected": "river " * (1 + i % 5)}
    for i in range(12)
]
BAD = [{"prompt": "a", "chosen": None, "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("llama")


@pytest.fixture
def config_file(tmp_path):
    """A config whose model has a tokenizer and no weights."""
    shutil.copytree(POLICY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS + BAD))
    file = tmp_path / "config.py"
    file.write_text(
        "from jaxalign import config as c\n"
        "def get_config(arg=None):\n"
        "    config = c.base()\n"
        "    config.steps, config.batch_size, config.max_length = 1, 4, 64\n"
        f"    config.model.path = {str(tmp_path / 'model')!r}\n"
        f"    config.data.path = {str(tmp_path / 'rows.jsonl')!r}\n"
        f"    config.data.cache_dir = {str(tmp_path / 'cache')!r}\n"
        "    config.data.eval.fraction = 0.4\n"
        "    return config\n"
    )
    return file


def test_the_report_counts_what_is_there(tokenizer, tmp_path):
    prepared = prepare(ROWS + BAD, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path, max_dropped_share=0.5)
    report = preview_lib.preview(prepared, tokenizer, batch_size=4, buckets=(24, 64), rows=2)
    assert (report["rows"], report["kept"], report["size"]) == (14, 12, 12)
    assert report["dropped"] == {"chosen is None": 1, "chosen and rejected are equal": 1}
    assert report["refused"] and report["dropped_share"] == pytest.approx(2 / 14, abs=1e-6)
    assert [entry["row"] for entry in report["dropped_rows"]] == [12, 13]
    assert json.loads(report["dropped_rows"][0]["text"]) == BAD[0]
    lengths = np.asarray([[len(prepared.sequence(i, j)[0]) for j in range(2)] for i in range(12)])
    prompts = np.asarray([len(prepared.prompt(i)) for i in range(12)])
    assert report["scored_share"] == pytest.approx((lengths - prompts[:, None]).sum() / lengths.sum(), abs=1e-6)
    assert report["lengths"]["prompt"]["100"] == prompts.max()
    assert report["lengths"]["chosen"]["100"] == (lengths[:, 0] - prompts).max()
    padded = sum(batch["share"] * 3 * batch["length"] * 8 for batch in report["batches"])
    assert report["padding_share"] == pytest.approx(1 - lengths.sum() / padded, abs=1e-4)
    example = report["examples"][1]
    assert len(report["examples"]) == 2 and example["row"] == prepared.source_row(1)
    shown = example["prompt"] + example["chosen"]
    ids, mask = prepared.sequence(1, 0)
    assert [token for token, *_ in shown] == ids.tolist() and [scored for *_, scored in shown] == mask.tolist()
    assert "".join(text for _, text, _ in example["chosen"]).strip() == ROWS[1]["chosen"] + tokenizer.eos_token
    json.dumps(report)


def test_the_command_prints_json_and_reads_no_weights(config_file, capsys):
    preview_lib.main(["preview", f"--config={config_file}", "--json", "--rows=1"])
    reports = json.loads(capsys.readouterr().out)
    assert list(reports) == ["train", "eval"]
    assert reports["train"]["size"] + reports["eval"]["size"] == reports["train"]["kept"] == 12
    assert reports["train"]["refused"] and len(reports["train"]["examples"]) == 1


def test_the_command_shows_tokens_mask_and_dropped_rows(config_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    preview_lib.main(["preview", f"--config={config_file}", "--rows=1"])
    shown = capsys.readouterr().out
    assert "<|bos|>|" in shown and "tokens, not scored" in shown and "<|im_end|>" in shown
    assert "left out: chosen is None" in shown and "too many: a run would refuse" in shown
    assert "eval data" in shown


def test_tokens_are_coloured_on_a_terminal(tokenizer, tmp_path):
    from rich.console import Console

    prepared = prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=100)
    preview_lib.show(preview_lib.preview(prepared, tokenizer, batch_size=4, rows=1), console)
    assert "\x1b[30;42m" in out.getvalue()


def test_a_piece_of_a_character_is_shown_by_its_name(tokenizer):
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    shown = preview_lib._tokens(tokenizer, np.asarray(ids), np.ones(len(ids), bool))
    assert [token for token, *_ in shown] == ids and not any("\ufffd" in text for _, text, _ in shown)


def test_data_that_cannot_be_read_ends_with_a_message(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        preview_lib.main(["preview", f"--config={config_file}", f"--config.data.path={config_file.parent}/row.jsonl"])
    assert stop.value.code == 1
    assert "did you mean" in capsys.readouterr().err


# ---- a batch under the field names of HALOs-like frameworks

SINGLES = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0} for i, row in enumerate(ROWS)]
CHATS = [
    {"messages": [{"role": "user", "content": "glass"}, {"role": "assistant", "content": "é" * i}]} for i in (2, 5)
]
SETUPS = {
    "sft": ("chats", ROWS, {}, [None]),
    "sft of chats": ("chats", CHATS, {}, [None]),
    "reward modelling": ("pairs", ROWS, {"rewards_known": False}, [None, None]),
    "offline pointwise": ("labelled", SINGLES, {}, ["label"]),
    "offline pairwise": ("pairs", ROWS, {}, [1.0, 0.0]),
}


@pytest.mark.parametrize("name", SETUPS)
def test_a_batch_of_each_offline_set_up_has_its_fields(tokenizer, tmp_path, name):
    kind, rows, options, rewards = SETUPS[name]
    prepared = prepare(rows, tokenizer=tokenizer, max_length=64, kind=kind, cache_dir=tmp_path)
    examples = [1, 0]
    fields = preview_lib.batch_fields(prepared, tokenizer, examples, **options)
    suffixes = ("", "_response_only", "_token_ids", "_attention_mask", "_reward", "_weight")
    names = [f"generation{n}{suffix}" for n in range(1, len(rewards) + 1) for suffix in suffixes]
    assert list(fields) == ["prompt", "prompt_token_ids", "prompt_attention_mask", *names]
    assert all(isinstance(values, list) and len(values) == 2 for values in fields.values())
    wanted = {"prompt": prepared.prompt}
    for n, reward in enumerate(rewards):
        field = f"generation{n + 1}"
        wanted[field] = lambda i, n=n: prepared.sequence(i, n)[0]
        labels = [float(rows[i]["label"]) for i in examples] if reward == "label" else [reward, reward]
        assert fields[f"{field}_reward"] == labels and fields[f"{field}_weight"] == [1.0, 1.0]
        responses = fields[f"{field}_response_only"]
        assert [prompt + text for prompt, text in zip(fields["prompt"], responses, strict=True)] == fields[field]
    for field, ids_of in wanted.items():
        for i, ids, mask in zip(examples, fields[f"{field}_token_ids"], fields[f"{field}_attention_mask"], strict=True):
            real = ids_of(i).tolist()
            assert ids[: len(real)] == real and set(ids[len(real) :]) <= {prepared.pad_id}
            assert mask == [1] * len(real) + [0] * (len(ids) - len(real))
            assert len(ids) == max(len(ids_of(other)) for other in examples)
    json.dumps(fields)


def test_weights_of_a_batch_come_from_a_column_or_a_function(tokenizer, tmp_path):
    rows = [{**row, "w": i} for i, row in enumerate(ROWS)]
    options = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": tmp_path}
    prepared = prepare(rows, weight_column="w", **options)
    assert preview_lib.batch_fields(prepared, tokenizer, [3, 0])["generation2_weight"] == [3.0, 0.0]
    prepared = prepare(ROWS, **options)
    report = preview_lib.preview(prepared, tokenizer, batch_size=4, weigh=lambda examples, step: examples / 2.0)
    first = preview_lib.ExampleSource(prepared, batch_size=4, seed=0).examples_of(0)
    assert report["batch"]["generation1_weight"] == (first / 2.0).tolist()
    assert report["batch"] == preview_lib.batch_fields(prepared, tokenizer, first, weights=first / 2.0)


def test_every_kind_is_shown_with_its_numbers(tokenizer, tmp_path):
    from rich.console import Console

    rows = [{**row, "a": 1.5, "b": -2, "reference": "gold", "label": True, "w": 3} for row in SINGLES]
    rows = [{**row, **ROWS[i]} for i, row in enumerate(rows)]
    shown = {}
    for kind in preview_lib.RESPONSES:
        columns = ("a", "b") if kind == "scored" else ()
        options = {"max_length": 64, "cache_dir": tmp_path, "weight_column": "w", "score_columns": columns}
        prepared = prepare(rows, tokenizer=tokenizer, kind=kind, **options)
        report = json.loads(json.dumps(preview_lib.preview(prepared, tokenizer, batch_size=4, rows=1)))
        out = io.StringIO()
        preview_lib.show(report, Console(file=out, width=120))
        shown[kind] = out.getvalue()
        assert f"kept ({kind})" in shown[kind] and "weight 3" in shown[kind]
        for name in preview_lib.RESPONSES[kind]:
            assert f"{name}: " in shown[kind]
        scored = sum(prepared.sequence(i, j)[1].sum() for i in range(len(prepared)) for j in range(prepared.width))
        assert report["scored_share"] == pytest.approx(scored / prepared.lengths.sum(), abs=1e-6)
    assert "label 1" in shown["labelled"] and "scores[0] 1.5, scores[1] -2" in shown["scored"]
    assert "label" not in shown["pairs"]


def test_turns_that_are_not_scored_stand_out_without_colours(tokenizer, tmp_path):
    from rich.console import Console

    turns = [{"role": ("user", "assistant")[n % 2], "content": "glass river"} for n in range(4)]
    prepared = prepare([{"messages": turns}], tokenizer=tokenizer, max_length=99, kind="chats", cache_dir=tmp_path)
    out = io.StringIO()
    preview_lib.show(preview_lib.preview(prepared, tokenizer, batch_size=1, rows=1), Console(file=out, width=500))
    assert "of them scored" in out.getvalue() and "‖" in out.getvalue()


def test_prompts_are_shown_with_their_columns_and_have_no_generation_before_a_run(config_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    (config_file.parent / "rows.jsonl").write_text(
        "".join(json.dumps({"n": i, "key": f"é{i}"}) + "\n" for i in range(20)) + '{"n": -1}\n'
    )
    (config_file.parent / "own.py").write_text("def ask(row):\n    return {'prompt': row['key'] + '?', **row}\n")
    keys = ("loss.name=grpo", "rewards.functions=length", "rollout.num_generations=2", "max_length=300")
    keys += (f"data.format={config_file.parent}/own.py:ask", "data.eval.fraction=0")
    arguments = ["preview", f"--config={config_file}", "--rows=1", *(f"--config.{key}" for key in keys)]
    preview_lib.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)["train"]
    assert (report["kind"], report["format"], report["transform"]) == ("prompts", "prompts", "own.py:ask")
    assert report["dropped"] == {"own.py:ask raised KeyError": 1} and report["kept"] == 20
    assert list(report["batch"]) == ["prompt", "prompt_token_ids", "prompt_attention_mask"]
    assert len(report["batch"]["prompt"]) == 2 and "batches" not in report  # set-up 3: two prompts, twice answered
    (shown,) = report["examples"]
    assert shown["columns"] == {"n": 0, "key": "é0"} and "".join(text for _, text, _ in shown["prompt"]).endswith("0?")
    preview_lib.main(arguments)
    out = capsys.readouterr().out
    assert "key: é0" in out and "raised KeyError" in out and "padding" not in out
    assert "(own.py:ask as prompts)" in " ".join(out.split())


@pytest.mark.parametrize(
    "loss, kind, rewards",
    [
        ("sft", "chats", [None]),
        ("reward", "pairs", [None, None]),
        ("kto", "labelled", [{0.0, 1.0}]),
        ("ipo", "pairs", [{1.0}, {0.0}]),
    ],
)
def test_the_command_shows_the_batch_of_the_configs_loss(config_file, capsys, loss, kind, rewards):
    preview_lib.main(["preview", f"--config={config_file}", "--json", f"--config.loss.name={loss}", "--rows=0"])
    report = json.loads(capsys.readouterr().out)["train"]
    assert report["kind"] == kind and len(report["batch"]["prompt"]) == 4
    found = [set(values) for name, values in report["batch"].items() if name.endswith("_reward")]
    assert found == [{None} if reward is None else reward for reward in rewards]
