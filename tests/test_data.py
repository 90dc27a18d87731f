"""Sources and the prepared cache."""

import gzip
import json
import shutil
import time

import numpy as np
import pytest
from common import FAMILIES, case, load_tokenizer, policy

from jaxalign import hf
from jaxalign.data import sources
from jaxalign.data.batching import ExampleSource, make_batch
from jaxalign.data.formats import RowError
from jaxalign.data.formats.hh import hh
from jaxalign.data.sources import prepare, read_rows, split_by_hash
from jaxalign.data.tokenizers import Lazy, change

SAMPLES = "package:jaxalign/data/samples/hh_rlhf_helpful_{}.jsonl.gz"
WORDS = "cloud teach glass river light paper ocean sugar train garden lemon answer".split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("qwen3")


def row(i, words=3):
    generator = np.random.default_rng(i)

    def say(n):
        return " ".join(generator.choice(WORDS, n))

    return {"prompt": f"{say(4)} {i} ", "chosen": f"{say(words)} yes", "rejected": f"{say(words)} no"}


ROWS = [row(i, 1 + i % 9) for i in range(37)]


@pytest.fixture
def prepared(tokenizer, tmp_path):
    return prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


# ---- reading


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    data = datasets.Dataset.from_list(ROWS)
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    data.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl.gz", ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "saved_splits"))
    (tmp_path / "loadable").mkdir()
    write_jsonl(tmp_path / "loadable" / "train.jsonl", ROWS)
    for source in ("a.parquet", "a.csv", "a.json", "a.jsonl", "b.jsonl.gz", "saved", "saved_splits", "loadable"):
        assert list(read_rows(str(tmp_path / source), split="train")) == ROWS, source
    assert list(read_rows(ROWS)) == list(read_rows(data)) == ROWS
    assert list(read_rows(tmp_path / "saved_splits", split="test")) == ROWS[:1]
    assert list(read_rows(str(tmp_path / "*.jsonl"))) == ROWS
    assert list(read_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])) == ROWS + ROWS
    assert list(read_rows(ROWS, limit=5)) == ROWS[:5]


def test_lines_end_at_newlines_only_and_a_broken_line_is_one_bad_row(tmp_path, tokenizer):
    odd = {**ROWS[0], "chosen": "a\u2028b\x85c"}
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + json.dumps(odd, ensure_ascii=False) + '\n\n{"prompt": "cut of\n' + json.dumps(ROWS[1]))
    rows = list(read_rows(file))
    assert rows[0] == odd and rows[2] == ROWS[1]
    done = prepare(file, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path, max_dropped_share=0.5)
    assert [entry["reason"] for entry in done.dropped()] == ["not JSON"]
    assert done.text(0) == odd and done.text(1) == ROWS[1] and done.source_row(1) == 2


def test_missing_things_are_named(tmp_path):
    write_jsonl(tmp_path / "helpful_train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"helpful_trian\.jsonl.*did you mean.*helpful_train\.jsonl"):
        read_rows(str(tmp_path / "helpful_trian.jsonl"))
    with pytest.raises(ValueError, match="the folder .*nowhere.* does not exist"):
        read_rows(str(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(ValueError, match="no data file"):
        read_rows(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match="nosuchpackage is not installed"):
        read_rows("package:nosuchpackage/a.jsonl")
    with pytest.raises(ValueError, match="did you mean.*hh_rlhf_helpful_train.jsonl.gz"):
        read_rows("package:jaxalign/data/samples/hh_rlhf_helpful_tran.jsonl.gz")
    with pytest.raises(ValueError, match="has no file"):
        read_rows("package:jaxalign/../tests/test_data.py")
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        read_rows("package:jaxalign/data/samples")
    with pytest.raises(ValueError, match="cannot read this kind of file"):
        read_rows(__file__)
    with pytest.raises(ValueError, match="split='test'.*has no splits"):
        read_rows(tmp_path / "helpful_train.jsonl", split="test")
    with pytest.raises(ValueError, match="list of dicts"):
        read_rows(3)


def test_a_hub_id_offline_says_so():
    with pytest.raises(ValueError, match="someone/some-pairs.*HF_HUB_OFFLINE is set"):
        read_rows("someone/some-pairs")


def test_a_damaged_file_is_named(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.jsonl.gz is damaged"):
        list(read_rows(file))


# ---- preparing


def test_truncation_is_trls(tmp_path):
    for family in FAMILIES:
        rows = case(family, "data_tokenization")[0]["data"]
        tokenizer = load_tokenizer(family)
        rows = rows["dpo_conversational"]["rows"]
        cut = prepare(rows, tokenizer=tokenizer, max_length=40, cache_dir=tmp_path, max_dropped_share=0.5)
        full = prepare(rows, tokenizer=tokenizer, max_length=200, cache_dir=tmp_path)
        fitting = [i for i in range(len(full)) if full.prompt_lengths[i] < 40]
        assert len(cut) == len(fitting)
        for at, i in enumerate(fitting):
            for j in range(2):
                for got, whole in zip(cut.sequence(at, j), full.sequence(i, j), strict=True):
                    np.testing.assert_array_equal(got, whole[:40])
            assert cut.prompt_lengths[at] == full.prompt_lengths[i]


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_batch_is_trls(family, tmp_path):
    """The rows of the golden truncated batch, token for token: chosen first there, side by side here."""
    golden = case(family, "dpo_trunc_keep_start")[1]
    tokenizer = load_tokenizer(family)
    rows = case(family, "data_tokenization")[0]["data"]
    rows = rows["dpo_conversational"]["rows"]
    cut = prepare(rows, tokenizer=tokenizer, max_length=40, cache_dir=tmp_path, max_dropped_share=0.5)
    batch = make_batch(cut, np.arange(len(cut)), 40)
    order = np.concatenate([np.arange(0, 2 * len(cut), 2), np.arange(1, 2 * len(cut), 2)])
    np.testing.assert_array_equal(batch["tokens"][order], golden["in.input_ids"])
    np.testing.assert_array_equal(batch["mask"][order], golden["in.completion_mask"].astype(bool))
    np.testing.assert_array_equal(batch["lengths"][order], golden["in.attention_mask"].sum(axis=1))


def test_what_does_not_fit_is_dropped_with_number_and_reason(tokenizer, tmp_path):
    long_prompt = {**row(1), "prompt": "garden " * 80}
    alike = {"prompt": "a ", "chosen": "glass " * 60 + "b", "rejected": "glass " * 60 + "c"}
    long_chosen = {"prompt": "a ", "chosen": "river " * 60, "rejected": "glass"}
    rows = [row(0), long_prompt, alike, long_chosen, {"chosen": "a"}, {**row(2), "rejected": " "}]
    options = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": tmp_path, "max_dropped_share": 0.9}
    listed = tmp_path / "run" / "dropped.jsonl"
    done = prepare(rows, dropped_path=listed, format="pairs", **options)
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in found] == [
        (1, "the prompt alone fills max_length"),
        (2, "chosen and rejected are equal after the cut to max_length"),
        (4, "no rejected column"),
        (5, "rejected is empty or blank"),
    ]
    assert [done.source_row(i) for i in range(len(done))] == [0, 3]
    assert done.lengths[1].tolist() == [64, len(done.sequence(1, 1)[0])] and done.meta["truncated"] == 1
    assert sum(done.meta["dropped"].values()) + done.meta["kept"] == done.meta["rows"] == 6
    assert done.source_text(4) == {"chosen": "a"}
    strict = prepare(rows, on_long="drop", **options)
    assert "longer than max_length" in strict.meta["dropped"] and len(strict) == 1
    short = prepare([{"prompt": "a ", "chosen": "b", "rejected": "c"}, row(1)], **options, max_prompt_length=6)
    assert short.meta["dropped"] == {"the prompt is longer than max_prompt_length": 1}


def test_too_many_dropped_rows_refuse_to_start(tokenizer, tmp_path):
    rows = ROWS[:6] + [{**row(0), "rejected": None}] * 2 + [{**row(0), "chosen": ""}]
    listed = tmp_path / "dropped.jsonl"
    options = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": tmp_path, "dropped_path": listed}
    for _ in range(2):  # made, and from the cache
        with pytest.raises(ValueError, match=r"3 of 9 rows \(33.3%\)(.|\n)*2 rejected is None(.|\n)*max_dropped_share"):
            prepare(rows, **options)
        assert len(listed.read_text().splitlines()) == 3
    assert len(prepare(rows, max_dropped_share=0.4, **options)) == 6


def test_a_source_without_usable_rows_says_which_columns_it_has(tokenizer, tmp_path):
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(ValueError, match="no chosen column(.|\n)*question, answer"):
        prepare(rows, tokenizer=tokenizer, max_length=8, cache_dir=tmp_path, max_dropped_share=1.0)
    with pytest.raises(ValueError, match="has no rows"):
        prepare([], tokenizer=tokenizer, max_length=8, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"max_length": 1}, {"format": "dpo"}, {"on_long": "left"}, {"max_dropped_share": 2.0}, {"limit": 0}]
)
def test_wrong_arguments_are_named(tokenizer, tmp_path, wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}, expected"):
        prepare(ROWS, **{"tokenizer": tokenizer, "max_length": 8, "cache_dir": tmp_path, **wrong})


def test_second_start_reads_the_cache_and_any_change_misses_it(tokenizer, tmp_path, monkeypatch):
    made = []
    encode = sources.encode_file
    monkeypatch.setattr(sources, "encode_file", lambda *args: made.append(1) or encode(*args))
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    cache = tmp_path / "cache"

    def start(source=file, tokenizer=tokenizer, **options):
        made.clear()
        done = prepare(source, tokenizer=tokenizer, cache_dir=cache, **{"max_length": 64, **options})
        return done, bool(made)

    first, missed = start()
    assert missed and cache.stat().st_mode & 0o077 == 0
    again, missed = start()
    assert not missed and again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.arrays["tokens"], first.arrays["tokens"])
    copied = shutil.copy(file, tmp_path / "other_name.jsonl")
    assert not start(copied)[1] and not start(tokenizer=tokenizer)[1]
    tokenizer(["a", "a b c"], padding=True)  # leaves padding switched on in the tokenizer's own state
    assert not start()[1]
    other = load_tokenizer("qwen3")
    change(other, chat_template="{{ messages }}")
    for options in ({"max_length": 32}, {"tokenizer": other}, {"on_long": "drop"}, {"limit": 30}):
        assert start(**options)[1], options
        assert not start(**options)[1], options
    other = load_tokenizer("llama")
    assert start(tokenizer=other)[1]
    write_jsonl(file, ROWS[1:] + ROWS[:1])
    changed, missed = start()
    assert missed and changed.fingerprint != first.fingerprint
    tokens = changed.folder / "tokens.npy"
    del changed
    tokens.write_bytes(tokens.read_bytes()[:-4])
    repaired, missed = start()
    assert missed and repaired.lengths.shape == (len(ROWS), 2)
    assert not list(cache.glob(".tmp-*"))


def test_the_fingerprint_is_that_of_the_tokens(tokenizer, tmp_path, prepared):
    elsewhere = prepare(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer, max_length=60, cache_dir=tmp_path)
    assert elsewhere.fingerprint == prepared.fingerprint
    assert prepared.select(np.arange(len(prepared))).fingerprint == prepared.fingerprint
    assert prepared.select(np.arange(5)).fingerprint != prepared.fingerprint


def test_a_killed_run_leaves_nothing_that_is_used(tokenizer, tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "assemble", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)) == len(ROWS)


def test_the_slower_of_two_writers_uses_the_faster_ones_work(tokenizer, tmp_path, monkeypatch):
    assemble = sources.assemble
    raced = []

    def race(*args):
        if not raced:
            raced.append(1)
            raced.append(prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path))
        return assemble(*args)

    monkeypatch.setattr(sources, "assemble", race)
    slower = prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)
    assert slower.folder == raced[1].folder and slower.fingerprint == raced[1].fingerprint
    assert len(list(tmp_path.iterdir())) == 1


def test_workers_make_the_same_as_one_process(tokenizer, tmp_path):
    rows = [{**row(i), "w": i} for i in range(2500)] + [{"chosen": None}]
    options = {"tokenizer": tokenizer, "max_length": 64, "kind": "labelled", "weight_column": "w"}
    alone = prepare(rows, cache_dir=tmp_path / "alone", workers=0, **options)
    together = prepare(rows, cache_dir=tmp_path / "together", workers=2, **options)
    assert alone.folder != together.folder and alone.fingerprint == together.fingerprint
    for key, values in alone.arrays.items():
        np.testing.assert_array_equal(values, together.arrays[key])
    assert alone.meta == {**together.meta}
    assert sorted(path.name for path in alone.folder.iterdir()) == sorted(
        path.name for path in together.folder.iterdir()
    )


@pytest.mark.slow
def test_a_second_start_on_100k_rows_takes_under_10_seconds(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[i % 37], "prompt": f"teach {i} "} for i in range(100_000)])
    options = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": tmp_path / "cache"}
    first = prepare(file, **options)
    began = time.monotonic()
    again = prepare(file, **options)
    batch = ExampleSource(again, batch_size=64, seed=0)(1000)
    assert time.monotonic() - began < 10
    assert len(again) == 100_000 and again.fingerprint == first.fingerprint and batch["tokens"].shape[0] == 128


def test_a_failing_worker_is_reported(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_tokenizer_json", lambda tokenizer: "{}")  # what the workers build theirs from
    with pytest.raises(RuntimeError, match=r"tokenizing worker \d ended with 1"):
        prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path, workers=2)
    assert list(tmp_path.iterdir()) == []


def test_what_the_tokenizer_lacks_is_said_before_any_worker_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "run_workers", lambda *args: pytest.fail("a worker was started"))
    bare = load_tokenizer("llama")
    bare.chat_template = None
    chat = [{"role": "user", "content": "a"}]
    rows = [{"prompt": chat, **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}}]
    with pytest.raises(ValueError, match="no chat template"):
        prepare(rows, tokenizer=bare, max_length=64, cache_dir=tmp_path, workers=2)


def test_the_samples_are_what_their_readme_says():
    reasons = {}
    for part, expected in (("train", 1700), ("test", 300)):
        rows = list(read_rows(SAMPLES.format(part)))
        assert len(rows) == expected
        for entry in rows:
            try:
                hh(entry)
            except RowError as error:
                reasons[error.reason] = reasons.get(error.reason, 0) + 1
    # 4 blank answers is what the source's README counts over all 2,352 pairs. It takes consecutive turns of the
    # assistant for one; here the prompt reaches to the last "Assistant:", so more histories differ.
    assert reasons == {
        "a turn holds 'Human:' or 'Assistant:'": 28,
        "the histories differ": 8,
        "wrong roles": 3,
        "rejected is empty or blank": 4,
    }


def test_the_samples_prepare(tokenizer, tmp_path):
    done = prepare(SAMPLES.format("test"), tokenizer=tokenizer, max_length=2048, cache_dir=tmp_path)
    assert done.meta["format"] == "hh" and len(done) >= 280 and done.meta["unfinished"] == 0
    assert sorted(done.text(0)) == ["chosen", "rejected"]
    assert tokenizer.decode(done.prompt(0)).endswith("<|im_start|>assistant\n")


def test_split_by_hash_keeps_each_prompt_in_one_part(tokenizer, tmp_path):
    rows = [{**row(i), "prompt": f"teach {i % 50} "} for i in range(200)]
    done = prepare(rows, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)
    train, held_out = split_by_hash(done, 0.3)
    assert len(train) + len(held_out) == 200 and 20 < len(held_out) < 100
    prompts = [{part.text(i)["prompt"] for i in range(len(part))} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    fewer = prepare(rows[:100], tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)
    assert {split_by_hash(fewer, 0.3)[1].text(i)["prompt"] for i in range(5)} <= prompts[1]
    assert len({done.fingerprint, train.fingerprint, held_out.fingerprint}) == 3
    with pytest.raises(ValueError, match="fraction"):
        split_by_hash(done, 1e-9)


def test_a_lazy_tokenizer_is_not_read_where_its_rows_are_kept_already(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(policy("qwen3"), folder)
    read = []

    def lazily(template=None):
        identity = hf.tokenizer_identity(folder, chat_template=template)
        lazy = Lazy(identity, lambda: read.append(1) or hf.load_tokenizer(folder, chat_template=template))
        return prepare(ROWS, tokenizer=lazy, max_length=64, cache_dir=tmp_path / "cache")

    first, again = lazily(), lazily()
    assert read == [1]
    eager = prepare(ROWS, tokenizer=load_tokenizer("qwen3"), max_length=64, cache_dir=tmp_path / "cache")
    assert first.folder == again.folder == eager.folder and first.pad_id == again.pad_id == eager.pad_id
    assert again.meta["vocab_size"] == len(load_tokenizer("qwen3"))

    file = folder / "chat_template.jinja"
    file.write_text("{#- another -#}" + file.read_text())
    assert lazily().folder != first.folder and read == [1, 1]
    assert lazily("{#- a third -#}" + file.read_text()).folder != first.folder and read == [1, 1, 1]
