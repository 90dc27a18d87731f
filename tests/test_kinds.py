"""Prepared examples of each kind: sequences, masks, columns of numbers, and what is dropped."""

import json

import numpy as np
import pytest
from common import FAMILIES, case, load_tokenizer

from jaxalign.data import sources
from jaxalign.data.formats import KINDS
from jaxalign.data.sources import prepare, split_by_hash
from jaxalign.data.tokenizers import byte_tokenizer, change

WORDS = "cloud teach glass river light paper ocean sugar train garden lemon answer".split()


def say(i, words):
    return " ".join(np.random.default_rng(i).choice(WORDS, words))


LABELLED = [
    {"prompt": f"{say(i, 3)} {i} ", "completion": say(i + 99, 1 + i % 5), "label": i % 3 == 0} for i in range(9)
]
PAIRS = [{"prompt": f"{say(i, 3)} {i} ", "chosen": say(i, 2) + " a", "rejected": say(i, 3) + " b"} for i in range(7)]
CHATS = [
    {"messages": [{"role": ("user", "assistant")[turn % 2], "content": say(9 * i + turn, 3)} for turn in range(4)]}
    for i in range(8)
]
TRIPLES = [{**row, "reference": f"{row['chosen']} gold"} for row in PAIRS]
SCORED = [
    {"prompt": row["prompt"], "response": row["completion"], "a": i, "b": i / 2} for i, row in enumerate(LABELLED)
]
ROWS = {"pairs": PAIRS, "labelled": LABELLED, "singles": LABELLED, "chats": CHATS, "triples": TRIPLES, "scored": SCORED}
ROWS["prompts"] = [{"prompt": row["prompt"], "answer": i} for i, row in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def make(tokenizer, tmp_path):
    """prepare() with a cache of its own."""

    def made(rows, kind, **options):
        score_columns = ("a", "b") if kind == "scored" else ()
        options = {"max_length": 128, "tokenizer": tokenizer, "score_columns": score_columns, **options}
        return prepare(rows, kind=kind, cache_dir=tmp_path / "cache", **options)

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_sequences_with_one_prompt(make, tokenizer, kind):
    done = make(ROWS[kind], kind)
    assert (done.kind, done.width, len(done)) == (kind, KINDS[kind], len(ROWS[kind]))
    assert done.lengths.shape == (len(done), done.width) and done.lengths.dtype == done.prompt_lengths.dtype == np.int32
    for i in range(len(done)):
        prompt = done.prompt(i)
        assert len(prompt) == done.prompt_lengths[i] > 0
        for j in range(done.width):
            ids, mask = done.sequence(i, j)
            assert (ids.dtype, mask.dtype) == (np.int32, bool) and ids.shape == mask.shape == (done.lengths[i, j],)
            np.testing.assert_array_equal(ids[: len(prompt)], prompt)
            if kind != "chats":
                np.testing.assert_array_equal(mask, np.arange(len(ids)) >= len(prompt))
    names = {"triples": ("chosen", "rejected", "reference"), "pairs": ("chosen", "rejected"), "scored": ("response",)}
    for j, name in enumerate(names.get(kind, ())):
        text = tokenizer.decode(done.sequence(3, j)[0])
        assert text == "<|bos|>" + done.text(3)["prompt"] + done.text(3)[name] + "<|im_end|>"


# ---- labelled


@pytest.mark.parametrize("family", FAMILIES)
def test_mismatched_completions_are_trls_rotation(family, make):
    golden = case(family, "data_tokenization")[0]["data"]["kto_conversational"]
    done = make(golden["rows"], "labelled", tokenizer=load_tokenizer(family))
    assert done.values["label"].tolist() == [float(row["label"]) for row in golden["tokenized"]]
    for i, row in enumerate(golden["tokenized"]):
        for j, completion in enumerate((row["completion_ids"], row["KL_completion_ids"])):
            ids, mask = done.sequence(i, j)
            assert ids.tolist() == row["prompt_ids"] + completion
            assert mask.tolist() == [False] * len(row["prompt_ids"]) + [True] * len(completion)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_become_labelled_examples_in_trls_order(family, make):
    """Token for token the batch that TRL makes of four pairs."""
    arrays = case(family, "kto_from_paired")[1]
    rows = case(family, "data_tokenization")[0]["data"]["dpo_conversational"]["rows"][:4]
    done = make(rows, "labelled", tokenizer=load_tokenizer(family))
    np.testing.assert_array_equal(done.values["label"], arrays["in.label"])
    assert [done.source_row(i) for i in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    for j, prefix in enumerate(("", "KL_")):
        for i in range(8):
            size = int(arrays[f"in.{prefix}attention_mask"][i].sum())
            ids, mask = done.sequence(i, j)
            np.testing.assert_array_equal(ids, arrays[f"in.{prefix}input_ids"][i, :size])
            np.testing.assert_array_equal(mask, arrays[f"in.{prefix}completion_mask"][i, :size])


def test_a_selection_rotates_its_own_completions(make):
    done = make(LABELLED, "labelled")
    part = done.select([7, 2, 5])
    responses = [part.sequence(i, 0)[0][part.prompt_lengths[i] :].tolist() for i in range(3)]
    for i in range(3):
        ids, mask = part.sequence(i, 1)
        assert ids.tolist() == part.prompt(i).tolist() + responses[i - 1]
        assert part.lengths[i].tolist() == [len(part.sequence(i, 0)[0]), len(ids)]
        assert mask.sum() == len(responses[i - 1])
    np.testing.assert_array_equal(part.values["label"], done.values["label"][[7, 2, 5]])
    alone = done.select([4])
    np.testing.assert_array_equal(alone.sequence(0, 1)[0], alone.sequence(0, 0)[0])


def test_a_mismatched_completion_is_cut_behind_its_new_prompt(make, tokenizer):
    """As TRL does: a completion that was cut behind its own long prompt is whole behind a short one."""
    rows = [
        {"prompt": "p" * 20, "completion": "abcdefgh" * 4, "label": True},
        {"prompt": "q", "completion": "short", "label": False},
    ]
    done = make(rows, "labelled", max_length=30)
    texts = [[tokenizer.decode(done.sequence(i, j)[0]) for j in range(2)] for i in range(2)]
    assert texts[0] == ["<|bos|>" + "p" * 20 + "abcdefgha", "<|bos|>" + "p" * 20 + "short<|im_end|>"]
    assert texts[1] == ["<|bos|>qshort<|im_end|>", "<|bos|>q" + ("abcdefgh" * 4)[:28]]
    assert done.lengths.tolist() == [[30, 27], [8, 30]] and done.meta["truncated"] == 1
    rows[0]["completion"] = "b" * 20  # kept whole in both cases, and cut when it is read
    assert len({make(rows, "labelled", max_length=cut).fingerprint for cut in (29, 30)}) == 2


def test_a_pair_that_loses_one_side_keeps_the_other(make):
    rows = [*PAIRS, {"prompt": "p" * 50, "chosen": "a", "rejected": "b" * 100}]
    done = make(rows, "labelled", on_long="drop", max_dropped_share=0.2)
    assert len(done) == 15 and done.meta["dropped"] == {"longer than max_length": 1}
    assert done.values["label"].tolist() == [1.0] * 8 + [0.0] * 7
    both = make([*PAIRS, {**rows[-1], "prompt": "p" * 200}], "labelled", max_dropped_share=0.2)
    assert both.meta["dropped"] == {"the prompt alone fills max_length": 1}  # a row is counted once


# ---- chats


def test_what_is_scored_of_a_chat_is_a_choice(make, tokenizer):
    runs = {}
    for train_on in ("assistant", "last", "all"):
        done = make(CHATS, "chats", train_on=train_on)
        ids, mask = done.sequence(2, 0)
        runs[train_on] = tokenizer.decode(ids[mask])
        assert tokenizer.decode(done.prompt(2)).endswith("<|im_start|>assistant\n")
    first, last = (CHATS[2]["messages"][at]["content"] + "<|im_end|>\n" for at in (1, 3))
    assert runs["assistant"] == first + last and runs["last"] == last
    assert runs["all"] == tokenizer.apply_chat_template(CHATS[2]["messages"], tokenize=False)[len("<|bos|>") :]


def test_a_cut_conversation_ends_with_the_last_answer_that_is_left(make, tokenizer):
    dialogue = [{"role": ("user", "assistant")[turn % 2], "content": f"{turn}" * 20} for turn in range(6)]
    whole = len(tokenizer.apply_chat_template(dialogue)["input_ids"])
    for cut, left in ((whole, "5"), (whole - 20, "5"), (whole - 25, "3"), (whole - 80, "3"), (whole - 110, "1")):
        done = make([{"messages": dialogue}], "chats", max_length=cut)
        ids, mask = done.sequence(0, 0)
        assert tokenizer.decode(done.prompt(0)).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(ids[done.prompt_lengths[0] :]).startswith(left) and mask[done.prompt_lengths[0]]
        assert mask.any() and done.prompt_lengths[0] < done.lengths[0, 0] == cut
    with pytest.raises(ValueError, match="the prompt alone fills max_length"):
        make([{"messages": dialogue}], "chats", max_length=30)
    with pytest.raises(ValueError, match="the prompt alone fills max_length"):
        make([{"messages": dialogue}], "chats", max_length=whole - 25, train_on="last")


def test_a_chat_of_which_nothing_is_scored_is_dropped(make):
    marked = (
        "{% for m in messages %}{{ m['content'] }}{% if 'teach' in m['content'] %}{% generation %}"
        "{{ '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer()
    change(tokenizer, chat_template=marked)
    done = make(CHATS, "chats", tokenizer=tokenizer, max_dropped_share=1.0)
    with_teach = [i for i, row in enumerate(CHATS) if any("teach" in turn["content"] for turn in row["messages"])]
    assert done.meta["dropped"] == {"no token is scored": 8 - len(with_teach)}
    assert [done.source_row(i) for i in range(len(done))] == with_teach


def test_texts_are_held_out_by_themselves(make):
    done = make([{"text": say(i, 6)} for i in range(40)], "chats")
    train, held_out = split_by_hash(done, 0.3)
    assert 4 < len(held_out) < 25 and len(train) + len(held_out) == 40
    pairs = make([{**row, "prompt": f"{i} "} for i, row in enumerate(PAIRS * 6)], "labelled")
    parts = [{part.text(i)["prompt"] for i in range(len(part))} for part in split_by_hash(pairs, 0.3)]
    assert not parts[0] & parts[1]


# ---- numbers


def test_columns_of_numbers_follow_their_examples(make):
    rows = [{**row, "margin": i / 4, "w": 2 - i % 2} for i, row in enumerate(PAIRS)]
    done = make(rows, "pairs", weight_column="w").select([5, 0])
    assert {name: values.tolist() for name, values in done.values.items()} == {"margin": [1.25, 0.0], "weight": [1, 2]}
    assert all(values.dtype == np.float32 for values in done.values.values())
    scored = make([{**row, "w": 3} for row in SCORED], "scored", weight_column="w").select([6, 1])
    assert scored.values["scores"].tolist() == [[6.0, 3.0], [1.0, 0.5]] and scored.values["weight"].tolist() == [3, 3]
    assert make(SCORED, "scored", score_columns=("b",)).values["scores"].shape == (9, 1)
    both = make([{**row, "w": i} for i, row in enumerate(PAIRS)], "labelled", weight_column="w")
    assert both.values["weight"].tolist() == [*range(7), *range(7)]
    alone = make(PAIRS, "singles")
    assert alone.values["label"].tolist() == [1.0] * 7 + [0.0] * 7 and alone.width == 1
    assert make(PAIRS, "pairs").values == {} and "margin" not in make(rows, "labelled").values


def test_a_pair_without_a_margin_is_plainly_ranked(make):
    done = make([{**PAIRS[0], "margin": None}, {**PAIRS[1], "margin": 2}, PAIRS[2]], "pairs")
    assert done.values["margin"].tolist() == [0.0, 2.0, 0.0]
    assert make([{**PAIRS[0], "margin": None}], "pairs").values == {}


@pytest.mark.parametrize(
    "kind, change, reason",
    [
        ("pairs", {"margin": "wide"}, "margin is text"),
        ("pairs", {"margin": float("nan")}, "margin is NaN"),
        ("pairs", {"w": None}, "w is None"),
        ("pairs", {"w": float("nan")}, "w is NaN"),
        ("pairs", {"w": -1}, "w is negative"),
        ("labelled", {"label": None}, "label is None"),
        ("scored", {"b": None}, "b is None"),
        ("scored", {"b": float("nan")}, "b is NaN"),
        ("scored", {"b": ...}, "no b column"),
    ],
)
def test_a_row_without_its_number_is_dropped_by_name(make, kind, change, reason):
    bad = {name: value for name, value in {**ROWS[kind][0], "w": 1, **change}.items() if value is not ...}
    good = [{**row, "w": 1, **({"margin": 1} if kind == "pairs" else {})} for row in ROWS[kind][1:]]
    done = make([bad, *good], kind, weight_column="w", max_dropped_share=0.2)
    assert done.meta["dropped"] == {reason: 1} and len(done) == len(good)


def test_numbers_of_a_csv_file_are_read(make, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("prompt,completion,label,w\n" + "".join(f"ask {i} ,b,{i % 2 == 0},{i}.5\n" for i in range(4)))
    done = make(file, "labelled", weight_column="w")
    assert done.values["label"].tolist() == [1, 0, 1, 0] and done.values["weight"].tolist() == [0.5, 1.5, 2.5, 3.5]


# ---- the cache


def test_numbers_and_kinds_are_part_of_the_fingerprint_and_of_the_cache(make, monkeypatch):
    made = []
    encode = sources.encode_file
    monkeypatch.setattr(sources, "encode_file", lambda *args: made.append(1) or encode(*args))
    rows = [{**row, "w": 1 + i, "label": True} for i, row in enumerate(PAIRS)]
    other = [{**row, "w": 2 + i} for i, row in enumerate(rows)]
    runs = [
        lambda: make(rows, "pairs"),
        lambda: make(rows, "pairs", weight_column="w"),
        lambda: make(other, "pairs", weight_column="w"),
        lambda: make(rows, "chats"),
        lambda: make(rows, "chats", train_on="all"),
        lambda: make(rows, "labelled"),
    ]
    for run in runs:
        made.clear()
        first = run()
        assert made
        made.clear()
        assert run().fingerprint == first.fingerprint and not made
    assert len({run().fingerprint for run in runs}) == len(runs)
    made.clear()
    assert make(rows, "pairs", train_on="last").fingerprint == runs[0]().fingerprint and not made


@pytest.mark.parametrize(
    "wrong", [{"kind": "trees"}, {"train_on": "first"}, {"score_columns": ("a",)}, {"kind": "scored"}]
)
def test_wrong_arguments_are_named(tokenizer, tmp_path, wrong):
    name = "score_columns" if wrong == {"kind": "scored"} else next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name}=.*, expected"):
        prepare(PAIRS, **{"tokenizer": tokenizer, "max_length": 8, "cache_dir": tmp_path, **wrong})


def test_a_source_of_another_kind_says_what_it_lacks(make):
    with pytest.raises(ValueError, match="7 no label column"):
        make([{"prompt": row["prompt"], "completion": "b"} for row in PAIRS], "labelled")
    with pytest.raises(ValueError, match="7 no reference column"):
        make(PAIRS, "triples")
    with pytest.raises(ValueError, match=r"no messages column(.|\n)*the columns are a"):
        make([{"a": 1}], "chats")
    listed = [json.dumps(row) for row in make(PAIRS[:1] + LABELLED[:1], "pairs", max_dropped_share=0.5).dropped()]
    assert len(listed) == 1 and "no chosen column" in listed[0]
