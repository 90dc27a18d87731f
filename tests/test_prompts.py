"""Prompts that a policy answers itself: how rows give them, the user's transforms, and what rewards get of a row."""

import json
import sys

import numpy as np
import pytest
from common import GOLDEN, load_tokenizer

from jaxalign import config, generate, user_code
from jaxalign.data import sources, transform
from jaxalign.data.chat import encode, encode_prompts
from jaxalign.data.formats import FORMATS, RowError, detect, read
from jaxalign.data.prepared import split_by_hash
from jaxalign.data.sources import prepare
from jaxalign.data.tokenizers import byte_tokenizer, change

USER = {"role": "user", "content": "cloud teach"}
OTHER = {"role": "user", "content": "glass"}
GOOD = {"role": "assistant", "content": "lemon"}
BAD = {"role": "assistant", "content": "bridge"}
SYSTEM = {"role": "system", "content": "river"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("qwen3")


@pytest.fixture
def make(tokenizer, tmp_path):
    """prepare() of prompts with a cache of its own."""

    def made(rows, **options):
        options = {"max_length": 200, "tokenizer": tokenizer, **options}
        return prepare(rows, kind="prompts", cache_dir=tmp_path / "cache", **options)

    return made


# ---- rows

ROWS = {
    "prompts of text": ({"prompt": "cloud ", "answer": "3"}, "cloud "),
    "prompts of text, its completion left out": ({"prompt": "cloud ", "completion": "teach"}, "cloud "),
    "prompts of text, the pair left out": ({"prompt": "cloud ", "chosen": "a", "rejected": "a"}, "cloud "),
    "prompts of messages": ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
    "prompts begun by the assistant": ({"prompt": [USER, GOOD]}, [USER, GOOD]),
    "prompts of a conversation": ({"messages": [USER, BAD, OTHER, GOOD]}, [USER, BAD, OTHER]),
    "prompts of a conversation that goes on": ({"messages": [USER, GOOD, OTHER]}, [USER]),
    "prompts of questions": ({"messages": [SYSTEM, USER], "prompt": "cloud"}, [SYSTEM, USER]),
    "pairs with text beside": ({"prompt": "glass", "chosen": [OTHER, GOOD], "rejected": [OTHER, BAD]}, [OTHER]),
    "pairs of whole dialogues": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    "hh": (
        {"chosen": "\n\nHuman: glass\n\nAssistant: a", "rejected": "\n\nHuman: glass\n\nAssistant: b"},
        [OTHER],
    ),
    "gsm8k": ({"question": "glass", "answer": "b\n#### 3"}, [OTHER]),
    "math": ({"problem": "glass", "solution": "\\boxed{3}"}, [OTHER]),
    "alpaca": ({"instruction": "glass", "input": "", "output": "b"}, [OTHER]),
    "dolly": ({"instruction": "glass", "response": "b"}, [OTHER]),
    "prompt_completion": ({"prompt": "glass", "completion": [OTHER, GOOD]}, [OTHER]),
}


def test_columns_are_there_whichever_rows_are_asked_for(make):
    done = make([{"prompt": f"cloud {i}", **({"answer": i} if i % 2 else {})} for i in range(4)])
    assert done.column_names == ("answer",)
    assert done.columns([0, 2]) == {"answer": [None, None]} and done.columns([1, 2]) == {"answer": [1, None]}
    late = make([*({"prompt": f"cloud {i}"} for i in range(100)), {"prompt": "glass", "late": 1}])
    assert late.columns([0]) == {} and late.columns([100, 0]) == {"late": [1, None]}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_its_prompt(make, tokenizer, name):
    row, prompt = ROWS[name]
    assert detect(row, "prompts") == name.split()[0]
    done = make([row])
    assert done.asked(0) == prompt and done.text(0) == row and done.kind == "prompts" and done.width == 1
    # The sampler's own way from a prompt to tokens.
    expected = generate.chat.encode_prompt(tokenizer, prompt)
    assert done.prompt(0).tolist() == expected and done.prompt_lengths.tolist() == [len(expected)]
    ids, mask = done.sequence(0, 0)
    assert ids.tolist() == expected and not mask.any() and done.lengths.tolist() == [[len(expected)]]
    assert (done.meta["truncated"], done.meta["unfinished"]) == (0, 0)
    assert done.columns([0]) == {key: [value] for key, value in row.items() if key != "prompt"}


def test_a_prompt_ends_where_the_answer_of_training_begins(make, tokenizer):
    for row, prompt in ROWS.values():
        if not isinstance(prompt, list) or prompt[-1]["role"] == "assistant":
            continue
        done = make([row])
        chosen, *_ = encode(tokenizer, read({"prompt": prompt, "completion": [GOOD]}, "prompt_completion", "scored"))
        assert chosen.sequences[0][: chosen.prompt_length] == done.prompt(0).tolist()


def test_the_assistant_goes_on_with_a_turn_that_it_has_begun(make, tokenizer):
    opened, whole = (make([{"prompt": prompt}]).prompt(0).tolist() for prompt in ([USER], [USER, GOOD]))
    assert tokenizer.decode(whole) == tokenizer.decode(opened) + GOOD["content"]
    trimming = byte_tokenizer()
    change(trimming, chat_template="{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    error = encode_prompts(trimming, [[USER, GOOD], "a"])
    assert error[0].reason == "the chat template refuses the messages" and error[1] == trimming("a")["input_ids"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "  "}, "prompt is empty or blank"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "prompt is None"),
        ({"answer": "3"}, "no prompt column"),
        ({"prompt": [USER, SYSTEM]}, "wrong roles"),
        ({"prompt": [SYSTEM]}, "wrong roles"),
        ({"messages": [GOOD, USER]}, "wrong roles"),
        (["prompt"], "not a JSON object"),
    ],
)
def test_a_row_without_a_prompt_says_why(row, reason):
    with pytest.raises(RowError) as error:
        FORMATS["prompts"](row)
    assert error.value.reason == reason


def test_what_has_no_prompt_is_dropped_and_a_prompt_alone_is_nothing_to_learn_from(make, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"1 no prompt column(.|\n)*1 not JSON(.|\n)*1 prompt is empty or blank"):
        make([{"a": "a"}, "no JSON", {"prompt": "  "}])
    with pytest.raises(ValueError, match="1 no prompt\n"):
        make([{"text": "a"}])
    with pytest.raises(ValueError, match="1 no response"):
        options = {"kind": "pairs", "format": "prompts", "cache_dir": tmp_path}
        prepare([{"prompt": "a"}], tokenizer=tokenizer, max_length=9, **options)


def test_long_prompts_are_dropped_and_never_cut(make):
    rows = [{"prompt": "cloud " * n} for n in (1, 5, 9)]
    lengths = make(rows).prompt_lengths.tolist()
    assert sorted(lengths) == lengths and len(set(lengths)) == 3
    done = make(rows, max_prompt_length=lengths[1], max_dropped_share=0.5)
    assert done.prompt_lengths.tolist() == lengths[:2]
    assert done.meta["dropped"] == {"the prompt is longer than max_prompt_length": 1}
    full = make(rows, max_length=lengths[2], max_dropped_share=0.5)  # no room for an answer
    assert full.meta["dropped"] == {"the prompt alone fills max_length": 1} and len(full) == 2


def test_columns_follow_their_rows_through_drops_splits_and_selections(make):
    rows = [{"prompt": f"cloud {i} ", "answer": i, **({"level": "easy"} if i % 2 else {})} for i in range(40)]
    rows[3] = {"prompt": "", "answer": -1}
    train, held_out = split_by_hash(make(rows), 0.3)
    picked = train.select(np.random.default_rng(0).permutation(len(train)))
    for part in (picked, held_out):
        for i in range(len(part)):
            number = int(part.asked(i).split()[1])
            columns = part.columns([i, 0])
            assert columns["answer"] == [number, int(part.asked(0).split()[1])]
            assert columns.get("level", [None])[0] == ("easy" if number % 2 else None)
    assert len(train) + len(held_out) == 39


def test_the_fingerprint_is_that_of_the_rows_too_and_the_cache_is_used(make, monkeypatch):
    made = []
    write = sources.encode_file
    monkeypatch.setattr(sources, "encode_file", lambda *args: made.append(1) or write(*args))
    rows = [{"prompt": "cloud ", "answer": 1}]
    first = make(rows)
    assert make(rows).folder == first.folder and made == [1]
    other = make([{**rows[0], "answer": 2}])
    assert other.prompt(0).tolist() == first.prompt(0).tolist() and other.fingerprint != first.fingerprint


# ---- transforms

CASES = [json.loads(line) for line in (GOLDEN / "dataset_formats" / "grpo_transform.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden["id"])
def test_transforms_are_axolotls(make, golden):
    dataset = golden["config"]["datasets"][0]
    options = {"format": user_code.beside(dataset["type"], GOLDEN / "dataset_formats"), "format_options": dataset}
    if "error" in golden["want"]:
        with pytest.raises(ValueError, match=r"no_such_(function|module)"):
            make([golden["row"]], **options)
        return
    done = make([golden["row"]], **options)
    assert done.text(0) == golden["want"] and list(done.text(0)) == list(golden["columns_after"] or done.text(0))
    assert done.asked(0) == golden["want"]["prompt"] and "prompt" not in done.columns([0])
    assert done.meta["transform"] == options["format"].rpartition("/")[2]


SOURCE = """
def numbers(row):
    if row["n"] == 3:
        return None
    if row["n"] == 4:
        raise KeyError("four")
    if row["n"] == 5:
        return "five"
    row["extra"].append(1)
    return {"prompt": f"cloud {10 // (row['n'] - 6)}", "n": row["n"]}

def template(cfg, dataset_idx=0):
    def row_function(row, tokenizer):
        return {"prompt": tokenizer.apply_chat_template(row["chat"], tokenize=False) + cfg["datasets"][0]["end"]}
    return row_function, {"remove_columns": "chat"}

def wrong(cfg, **kwargs):
    return 3

def unknown(cfg, **kwargs):
    return (lambda row: row), {"batched": True}

def pair(row):
    return {"prompt": row["n"], "chosen": "lemon", "rejected": "bridge"}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(SOURCE)
    return path


def test_a_plain_function_gives_the_row_leaves_it_out_or_costs_it(make, file):
    rows = [{"n": n, "extra": []} for n in range(8)]
    done = make(rows, format=f"{file}:numbers", max_dropped_share=0.5)
    kept = [{"prompt": f"cloud {10 // (n - 6)}", "n": n} for n in (0, 1, 2, 7)]
    assert [done.text(i) for i in range(len(done))] == kept
    assert rows[0] == {"n": 0, "extra": []}  # what a function does to its row stays its own
    assert done.meta["dropped"] == {
        "left out by own.py:numbers": 1,
        "own.py:numbers raised KeyError": 1,
        "own.py:numbers returned text": 1,
        "own.py:numbers raised ZeroDivisionError": 1,
    }
    dropped = list(done.dropped())
    assert [entry["row"] for entry in dropped] == [3, 4, 5, 6]
    assert dropped[1]["detail"] == "'four' (own.py, line 6)" and done.source_text(4) == rows[4]
    with pytest.raises(ValueError, match=r"1 own.py:numbers raised KeyError(.|\n)*the columns are n, extra"):
        make(rows[4:5], format=f"{file}:numbers")


def test_rows_that_the_function_does_not_want_may_be_any_number(make, file):
    rows = [{"n": 3, "extra": []}] * 20 + [{"n": 7, "extra": []}]
    assert len(make(rows, format=f"{file}:numbers", max_dropped_share=0.0)) == 1
    with pytest.raises(
        ValueError, match=r"21 of 22 rows (.|\n)*20 left out by own.py:numbers\n *1 own.py:numbers raised"
    ):
        make([*rows, {"n": 4, "extra": []}], format=f"{file}:numbers", max_dropped_share=0.0)


def test_a_row_that_the_function_refused_does_not_say_what_the_others_are(make, file):
    rows = [{"n": 3, "question": "a", "answer": "b"}, {"n": 2, "extra": []}]
    done = make(rows, format=f"{file}:numbers", max_dropped_share=0.5)
    assert done.meta["format"] == "prompts" and len(done) == 1


def test_workers_read_what_was_transformed_once(make, file, tokenizer, tmp_path):
    rows = [{"n": 7 + n % 9, "extra": []} for n in range(1500)] + [{"n": n, "extra": []} for n in (3, 4)]
    options = {"format": f"{file}:numbers", "tokenizer": tokenizer, "max_length": 99, "kind": "prompts"}
    alone = prepare(rows, workers=0, cache_dir=tmp_path / "a", **options)
    together = prepare(rows, workers=2, cache_dir=tmp_path / "b", **options)
    assert alone.folder != together.folder and alone.meta == together.meta
    assert together.text(1499) == {"prompt": f"cloud {10 // (1 + 1499 % 9)}", "n": 7 + 1499 % 9}


def test_workers_have_the_chat_template(make):
    other = load_tokenizer("qwen3")
    change(other, chat_template="{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    done = make([{"prompt": [USER]}], tokenizer=other, workers=2)
    assert other.decode(done.prompt(0)) == USER["content"] + "!"


def test_a_function_may_use_the_tokenizer_and_its_options_and_feed_other_kinds(make, file, tokenizer, tmp_path):
    row = {"chat": [USER], "answer": 1}
    done = make([row], format=f"{file}:template", format_options={"end": "!"})
    text = tokenizer.apply_chat_template([USER], tokenize=False) + "!"
    assert done.text(0) == {"answer": 1, "prompt": text} and done.asked(0) == text
    pairs = prepare([{"n": "a "}], tokenizer=tokenizer, max_length=99, format=f"{file}:pair", cache_dir=tmp_path / "b")
    assert pairs.kind == "pairs" and pairs.meta["format"] == "pairs"


def test_a_changed_function_or_option_is_another_cache_key(make, file):
    rows = [{"chat": [USER]}]
    first = make(rows, format=f"{file}:template", format_options={"end": "!"})
    assert make(rows, format=f"{file}:template", format_options={"end": "!"}).folder == first.folder
    assert make(rows, format=f"{file}:template", format_options={"end": "?"}).folder != first.folder
    file.write_text(SOURCE.replace("tokenize=False)", "tokenize=False, add_generation_prompt=True)"))
    changed = make(rows, format=f"{file}:template", format_options={"end": "!"})
    assert changed.folder != first.folder and changed.prompt_lengths[0] > first.prompt_lengths[0]


def test_a_function_that_is_neither_is_named(make, file):
    with pytest.raises(ValueError, match=r"own.py:wrong takes dataset_idx or \*\*kwargs(.|\n)*returned int"):
        make([{}], format=f"{file}:wrong")
    with pytest.raises(ValueError, match="own.py:unknown returned \\['batched'\\]"):
        make([{}], format=f"{file}:unknown")
    with pytest.raises(ValueError, match="format_options"):
        make([{"prompt": "a"}], format_options={"a": 1})
    with pytest.raises(RowError, match="not a JSON object"):
        transform.load(f"{file}:pair", dataset={})("text", None)


def test_a_config_finds_the_function_beside_itself(tmp_path, file, monkeypatch):
    (tmp_path / "run.py").write_text(
        "from jaxalign import config\n\n\ndef get_config(arg=None):\n    c = config.base()\n    c.steps = 1\n"
        "    c.model.path = c.data.path = 'x'\n    c.data.format = 'own.template'\n"
        "    c.data.format_options = {'end': '!'}\n    return c\n"
    )
    monkeypatch.chdir("/")
    loaded = config.load(str(tmp_path / "run.py"))
    assert loaded.data.format == f"{file}:template" and loaded.data.format_options == {"end": "!"}
    with pytest.raises(ValueError, match="data.format_options = .* has no effect"):
        config.load(str(tmp_path / "run.py"), ["data.format=pairs"])
    with pytest.raises(ValueError, match=r"data.format: got 'pears', expected auto, FILE.function"):
        config.load(str(tmp_path / "run.py"), ["data.format=pears", "data.format_options=none"])


def test_the_function_of_a_module_is_known_by_its_file(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(GOLDEN / "dataset_formats"), *sys.path])
    names = ("golden_transforms.drop_all", "golden_transforms.drop_missing", "golden_pkg.tasks.upper_question")
    assert len({user_code.fingerprint(name) for name in names}) == 3
    beside = user_code.beside("golden_pkg.tasks.upper_question", GOLDEN / "dataset_formats")
    assert beside.endswith("golden_pkg/tasks.py:upper_question")
    assert user_code.fingerprint(beside) == user_code.fingerprint(names[2])
