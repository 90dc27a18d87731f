"""Rewards of form: TRL's numbers where TRL ships the same, worked out by hand elsewhere."""

import json
import subprocess
import sys

import pytest
from common import GOLDEN

from jaxalign.rewards import format

TRL = json.loads((GOLDEN / "rewards" / "trl.json").read_text())
CASES = json.loads((GOLDEN / "cases" / "llama" / "data_conversions.json").read_text())["data"]["rewards"]


def of(function, *texts, **options):
    return function([None] * len(texts), list(texts), **options)


def of_ids(function, *ids, **options):
    return function([None] * len(ids), [""] * len(ids), [list(i) for i in ids], **options)


def test_the_think_format_is_trls():
    cases = CASES["think_format_reward"] + TRL["think_format_reward"]
    assert of(format.format, *(case["in"] for case in cases), pattern="think") == [case["out"] for case in cases]


def test_repetition_is_trls():
    for case in CASES["repetition_penalty(3,-1.0)"] + TRL["repetition_penalty"]:
        options = {name: case[name] for name in ("ngram_size", "max_penalty") if name in case}
        assert of_ids(format.repetition, case["in"], **options) == [pytest.approx(case["out"])]


def test_overlong_is_trls():
    for case in CASES["soft_overlong_punishment(100,20)"] + TRL["soft_overlong_punishment"]:
        limit, cache = case.get("max_completion_len", 100), case.get("soft_punish_cache", 20)
        found = of_ids(format.overlong, range(case["completion_len"]), max_completion_length=limit, cache=cache)
        assert found == [pytest.approx(case["out"])], case


def test_overlong_has_the_papers_share_of_a_fifth():
    found = of_ids(format.overlong, range(80), range(90), range(100), range(101), max_completion_length=100)
    assert found == [0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<think>a</think><answer>4</answer>", 1),
        ("\n<think>\na < b\n</think>\n\n<answer>\n4\n</answer>\n", 1),
        ("<think>a</think>\n<answer>4</answer> indeed", 0),
        ("so <think>a</think><answer>4</answer>", 0),
        ("<think></think><answer>4</answer>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<answer>4</answer><think>a</think>", 0),
        ("<think>a<think>b</think><answer>4</answer>", 0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0),
        ("<think>a</think><answer>4", 0),
        ("", 0),
    ],
)
def test_thoughts_and_an_answer_and_nothing_beside(text, want):
    assert of(format.format, text) == of(format.format, [{"role": "assistant", "content": text}]) == [want]


def test_a_form_of_ones_own_and_what_the_prompt_has_opened():
    assert of(format.format, "a 12", "a\n12", "a 12 b", pattern=r"a.\d+") == [1, 1, 0]
    assert of(format.format, "b</think><answer>4</answer>", prefix="<think>") == [1]
    assert of(format.tags, "b</think><answer>4</answer>") == [0.75]
    assert of(format.tags, "b</think><answer>4</answer>", prefix="<think>") == [1]


def test_each_tag_counts_that_stands_once():
    texts = ["<think>a</think><answer>4</answer>", "<think>a</think>4", "<think><think>a</think>", "4", ""]
    assert of(format.tags, *texts) == [1, 0.5, 0.25, 0, 0]
    assert of(format.tags, "a. b", tags=["a.", "b", "c", "d"]) == [0.5]


def test_length_meets_a_target_or_falls_with_it():
    lengths = [range(n) for n in (0, 5, 10, 15, 20, 30)]
    assert of_ids(format.length, *lengths, target=10) == [0, 0.5, 1, 0.5, 0, 0]
    assert of_ids(format.length, *lengths, target=10, shape="linear") == [1, 0.5, 0, 0, 0, 0]


def test_keywords_are_whole_words():
    texts = ["The SKY is blue", "skyblue", "sky", "", "sky sky"]
    assert of(format.keyword, *texts, keywords=["sky", "blue"]) == [1, 0, 0.5, 0, 0.5]
    assert of(format.keyword, *texts, keywords=["sky"], ignore_case=False) == [0, 0, 1, 0, 1]
    assert of(format.keyword, "costs $5.00 (a+b)", "costs $5x00", keywords=["$5.00", "(a+b)"]) == [1, 0]


def test_the_text_of_messages_is_what_the_assistant_said_last():
    turns = [
        {"role": "assistant", "content": "first"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "last"},
    ]
    assert [format.text_of(turns[:n]) for n in range(4)] == ["", "first", "first", "last"]
    assert format.text_of([{"content": "of no role"}]) == "of no role"
    assert format.text_of([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (format.format, {"pattern": "(a"}, r"pattern='\(a' is no regular expression"),
        (format.tags, {"tags": "<think>"}, "expected a list of texts"),
        (format.tags, {"tags": []}, "expected a list of texts"),
        (format.keyword, {"keywords": "sky"}, "expected a list of words"),
        (format.keyword, {"keywords": []}, "expected a list of words"),
        (format.length, {"target": 0}, "target=0, shape='target'"),
        (format.length, {"target": 5, "shape": "cosine"}, "expected a positive number of tokens, and target or linear"),
        (format.overlong, {"max_completion_length": 5, "cache": 6}, "cache=6 tokens is not between 0 and"),
        (format.repetition, {"ngram_size": 0}, "ngram_size=0"),
        (format.repetition, {"max_penalty": 1.0}, "a penalty of at most 0"),
    ],
)
def test_options_are_checked_before_there_is_a_completion(function, options, message):
    ids = {"completion_ids": []} if function in (format.length, format.overlong, format.repetition) else {}
    with pytest.raises(ValueError, match=message):
        function([], [], **ids, **options)


def test_a_rewards_process_imports_no_jax():
    program = (
        "import sys, jaxalign.rewards.format, jaxalign.rewards.math; print({'jax', 'numpy', 'sympy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
