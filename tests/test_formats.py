"""Rows with one response, triples, labels, and what each kind makes of a row."""

import math
from dataclasses import replace

import pytest

from jaxalign.data.formats import FORMATS, KINDS, Example, RowError, convert, detect
from jaxalign.data.formats.example import read_label, read_number

USER = {"role": "user", "content": "cloud teach glass"}
GOOD = {"role": "assistant", "content": "prompt lemon clear"}
BAD = {"role": "assistant", "content": "bridge kind"}
TRANSCRIPT = "\n\nHuman: a\n\nAssistant: b"


def asked(question, answer):
    return Example([{"role": "user", "content": question}], ([{"role": "assistant", "content": answer}],))


ROWS = {
    "text": ({"text": "a b c"}, Example("", ("a b c",))),
    "text alone in prompt": ({"prompt": "a b c"}, Example("", ("a b c",))),
    "prompt_completion": ({"prompt": "a ", "completion": "b"}, Example("a ", ("b",))),
    "prompt_completion as response": ({"prompt": "a ", "response": "b", "helpfulness": 3}, Example("a ", ("b",))),
    "prompt_completion labelled": ({"prompt": "a ", "completion": "b", "label": 0}, Example("a ", ("b",), label=False)),
    "prompt_completion of messages": ({"prompt": [USER], "completion": [GOOD]}, Example([USER], ([GOOD],))),
    "prompt_completion with the prompt repeated": (
        {"prompt": [USER], "completion": [USER, GOOD]},
        Example([USER], ([GOOD],)),
    ),
    "prompt_completion with the prompt repeated from text": (
        {"prompt": USER["content"], "completion": [USER, GOOD]},
        Example([USER], ([GOOD],)),
    ),
    "prompt_completion of a whole conversation": (
        {"completion": [USER, BAD, USER, GOOD], "label": True},
        Example([USER, BAD, USER], ([GOOD],), label=True, conversation=True),
    ),
    "messages": ({"messages": [USER, BAD, USER, GOOD]}, Example([USER, BAD, USER], ([GOOD],), conversation=True)),
    "messages that go on": ({"messages": [USER, GOOD, USER]}, Example([USER], ([GOOD],), conversation=True)),
    "messages labelled": (
        {"messages": [USER, GOOD], "label": True},
        Example([USER], ([GOOD],), label=True, conversation=True),
    ),
    "dolly": ({"instruction": "a?", "context": "b", "response": "c", "category": "qa"}, asked("a?\n\nb", "c")),
    "dolly without context": ({"instruction": "a?", "context": "", "response": "c"}, asked("a?", "c")),
    "alpaca": ({"instruction": "a?", "input": "b", "output": "c", "text": "as one"}, asked("a?\n\nb", "c")),
    "alpaca without input": ({"instruction": "a?", "input": None, "output": "c"}, asked("a?", "c")),
    "gsm8k": ({"question": "a?", "answer": "b\n#### 3"}, asked("a?", "b\n#### 3")),
    "math": ({"problem": "a?", "solution": "\\boxed{3}", "level": "5"}, asked("a?", "\\boxed{3}")),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_one_response_are_found_and_read(name):
    row, expected = ROWS[name]
    for kind in ("chats", "scored"):
        assert detect(row, kind) == name.split()[0]
    assert FORMATS[name.split()[0]](row) == expected


@pytest.mark.parametrize(
    "format, row, reason",
    [
        ("messages", {"messages": "a"}, "messages is text"),
        ("messages", {"messages": [USER]}, "no turn of the assistant"),
        ("messages", {"messages": [GOOD]}, "no prompt"),
        ("messages", {"messages": [USER, {**GOOD, "content": " "}, USER, GOOD]}, "a turn of the assistant is blank"),
        ("messages", {"messages": [USER, GOOD], "label": "good"}, "label is text"),
        ("messages", {}, "no messages column"),
        ("prompt_completion", {"completion": "b"}, "no prompt column"),
        ("prompt_completion", {"prompt": "a"}, "no completion column"),
        ("prompt_completion", {"prompt": "a", "completion": [GOOD]}, "prompt and responses are of different kinds"),
        ("prompt_completion", {"prompt": [USER], "completion": "b"}, "prompt and responses are of different kinds"),
        ("prompt_completion", {"prompt": "a", "completion": " "}, "completion is empty or blank"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": None}, "label is None"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": 2}, "label is a number"),
        ("text", {"text": None}, "text is None"),
        ("text", {"text": [USER]}, "text is a list of messages"),
        ("dolly", {"instruction": "a", "context": 3, "response": "c"}, "context is a number"),
        ("alpaca", {"instruction": " ", "output": "c"}, "instruction is empty or blank"),
        ("gsm8k", ["a"], "not a JSON object"),
        ("hh", {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": "b Human: c"}, "a turn holds 'Human:' or "),
        ("hh", {"prompt": "a", "completion": "b"}, "completion is no transcript"),
        ("triples", {"prompt": "a", "chosen": "b", "rejected": "c"}, "no reference column"),
        ("triples", {"chosen": "a b", "rejected": "a c", "reference": "d"}, "no common prompt"),
        ("triples", {"prompt": "a", "chosen": "b", "rejected": "c", "reference": " "}, "reference is empty or blank"),
    ],
)
def test_a_bad_row_says_why(format, row, reason):
    with pytest.raises(RowError) as error:
        FORMATS[format](row)
    assert error.value.reason.startswith(reason)


def test_triples_have_trls_columns():
    gold = {"role": "assistant", "content": "gold"}
    expected = Example([USER], ([GOOD], [BAD], [gold]))
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD], "reference": [USER, gold]}
    assert FORMATS["triples"](row) == replace(expected, conversation=True)
    named = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "reference": [gold]}
    assert FORMATS["triples"](named) == FORMATS["triples"]({**row, "prompt": [USER]}) == expected
    assert detect(named, "triples") == "triples" and detect(named, "pairs") == "pairs"
    texts = {"chosen": "a b", "rejected": "a c", "reference": "a d"}
    assert FORMATS["triples"](texts) == Example("a", (" b", " c", " d"))


def test_a_row_that_is_several_things_is_read_for_the_kind():
    both = {"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    assert [detect(both, kind) for kind in ("pairs", "chats", "labelled", "scored")] == [
        "pairs",
        "messages",
        "pairs",
        "messages",
    ]
    assert detect({**both, "label": True}, "labelled") == "messages"
    transcripts = {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}
    assert {detect(transcripts, kind) for kind in ("pairs", "chats", "labelled")} == {"hh"}
    unpaired = {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": " b", "label": True}
    assert detect(unpaired, "labelled") == "prompt_completion"
    for kind in KINDS:
        assert detect({"a": 1}, kind) is None and detect("text", kind) is None
    assert detect({"messages": None, "text": "a"}, "chats") == "text"
    assert detect({"prompt": "a", "chosen": None, "rejected": "b"}, "chats") is None


PAIR = Example([USER], ([GOOD], [BAD]), conversation=True)
SINGLE = Example([USER], ([GOOD],), conversation=True)


def test_each_kind_takes_what_it_can_use():
    plain = replace(PAIR, conversation=False)
    assert convert(PAIR, "pairs") == [plain]
    assert convert(PAIR, "chats") == [SINGLE]
    # TRL's unpair_preference_dataset.
    assert convert(PAIR, "labelled") == [Example([USER], ([GOOD],), label=True), Example([USER], ([BAD],), label=False)]
    triple = replace(plain, responses=([GOOD], [BAD], [GOOD]))
    assert convert(triple, "triples") == [triple] and convert(triple, "pairs") == [plain]
    assert len(convert(triple, "labelled")) == 2
    desirable = replace(SINGLE, label=True)
    assert convert(desirable, "chats") == [SINGLE]
    assert convert(desirable, "labelled") == [replace(desirable, conversation=False)]
    assert convert(SINGLE, "scored") == [replace(SINGLE, conversation=False)]
    assert convert(Example("", ("a",)), "chats") == [Example("", ("a",))]


@pytest.mark.parametrize(
    "example, kind, reason",
    [
        (SINGLE, "pairs", "wrong number of responses"),
        (PAIR, "triples", "wrong number of responses"),
        (PAIR, "scored", "wrong number of responses"),
        (SINGLE, "labelled", "no label column"),
        (replace(SINGLE, label=False), "chats", "the label says undesirable"),
        *((Example("", ("a",)), kind, "no prompt") for kind in KINDS if kind != "chats"),
    ],
)
def test_a_row_of_another_kind_says_why_it_is_none(example, kind, reason):
    with pytest.raises(RowError) as error:
        convert(example, kind)
    assert error.value.reason == reason


def test_labels_and_numbers_are_read_as_files_spell_them():
    for value, label in ((True, True), (False, False), (1, True), (0.0, False), ("True", True), ("0", False)):
        assert read_label({"label": value}) is label
    assert read_label({}) is None
    assert [read_number({"a": value}, "a") for value in (3, "2.5", True)] == [3.0, 2.5, 1.0]
    for value, reason in (
        (None, "a is None"),
        (math.nan, "a is NaN"),
        ("nan", "a is NaN"),
        (math.inf, "a is infinite"),
        ("x", "a is text"),
        ([1], "a is a list"),
    ):
        with pytest.raises(RowError) as error:
            read_number({"a": value}, "a")
        assert error.value.reason == reason
    with pytest.raises(RowError, match="no a column: the row has b"):
        read_number({"b": 1}, "a")
