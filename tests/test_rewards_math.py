"""Rewards of right answers: verl's extraction for GSM8K, TRL's numbers for mathematics, and nothing that hangs."""

import builtins
import json
import threading
import time

import numpy as np
import pytest
from common import GOLDEN

from jaxalign import rewards
from jaxalign.rewards import math

TRL = json.loads((GOLDEN / "rewards" / "trl.json").read_text())
GOLD = "She bought 2,000 + 125 = <<2000+125=2125>>2125 pens.\n#### 2,125"
# Math-Verify's issue 65: its comparison raises 5 to 5^5^5^5 within one operation, which no timer of its ends.
ISSUE_65 = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"
ALSO_65 = "{@Neillier 1276915 4951077 国 {1,1-3-10鼓励不停);5个_GENERAL2全校。 _HEADERS1 Orchestra}"


def of(function, text, answer=GOLD, **options):
    (reward,) = function([None], [text], answer=[answer], **options)
    (of_messages,) = function([None], [[{"role": "assistant", "content": text}]], answer=[answer], **options)
    assert reward == of_messages
    return reward


# GSM8K


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 2125.\n#### 2125", 1, 1),
        ("#### 2,125", 1, 1),
        ("#### $2,125.00", 1, 1),
        ("####2125", 1, 1),
        ("#### 2125.", 1, 1),
        ("#### 2125 pens", 1, 1),
        ("#### 2125 and then #### 7", 0, 0),
        ("#### 7 and then #### 2125", 1, 1),
        ("#### 2125, of 3", 1, 0),
        ("The answer is 2125.", 0, 1),
        (r"It is \boxed{2125}", 0, 1),
        ("#### x = 2125", 0, 1),
        ("#### -2125", 0, 0),
        ("#### -$2125", 0, 0),
        ("#### 212", 0, 0),
        ("#### 21250", 0, 0),
        ("#### 2125.5", 0, 0),
        ("####", 0, 0),
        ("no number", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_takes_the_last_marked_or_the_last_number(text, strict, flexible):
    assert of(math.gsm8k, text) == strict
    assert of(math.gsm8k, text, method="flexible") == flexible
    assert of(math.number_flexible, text) == flexible


def test_gsm8k_looks_at_the_end_alone():
    behind = "#### 2125" + " " * 291
    assert [of(math.gsm8k, behind + more) for more in ("", " ")] == [1, 0]
    assert of(math.gsm8k, behind + " ", window=0) == of(math.gsm8k, behind + " ", window=301) == 1


@pytest.mark.parametrize(
    ("answer", "text"),
    [(GOLD, "#### 2125"), ("18", "#### 18"), (18, "#### 18"), (18.0, "#### 18"), ("$-3.50", "#### -3.5"), (0, "#### 0")]
    + [("#### .5", "#### 0.5"), (1e20, "#### 100000000000000000000"), (10**30 + 1, f"#### {10**30 + 1}")],
)
def test_answers_are_solutions_or_numbers(answer, text):
    assert of(math.gsm8k, text, answer) == 1
    assert of(math.gsm8k, text + "1", answer) == 0


@pytest.mark.parametrize("answer", [None, "", "####", "eighteen", "nan", "1/2", "Infinity", True])
def test_a_row_without_a_number_has_no_reward(answer):
    for function in (math.gsm8k, math.number, math.number_flexible):
        assert of(function, "#### 1", answer) is None


# Numbers


def test_a_number_is_the_whole_completion_or_what_a_pattern_finds():
    texts = [" 2,125\n", "$2125.", "2125 pens", "It is 2125", "", "21 25"]
    assert [of(math.number, text) for text in texts] == [1, 1, 0, 0, 0, 0]
    tagged = ["<answer>7</answer> no, <answer>\n2125\n</answer>", "<answer>2125</answer><answer>7</answer>", "2125"]
    assert [of(math.number, text, pattern="<answer>(.*?)</answer>") for text in tagged] == [1, 0, 0]


def test_a_tolerance_is_a_share_of_the_answer():
    for function in (math.number, math.number_flexible):
        assert [of(function, text, "200", tolerance=0.01) for text in ("198", "202", "197.9", "202.1")] == [1, 1, 0, 0]
        assert [of(function, text, "0", tolerance=0.01) for text in ("0.01", "-0.01", "0.011")] == [1, 1, 0]


# Mathematics


def test_mathematics_is_trls_accuracy():
    cases = TRL["accuracy_reward"]
    completions = [[{"role": "assistant", "content": case["completion"]}] for case in cases]
    found = math.accuracy([None] * len(cases), completions, solution=[case["solution"] for case in cases])
    for case, reward in zip(cases, found, strict=True):
        assert reward == case["out"], case


def test_what_stands_behind_the_thoughts_counts_as_in_trls_reasoning_accuracy():
    for case in TRL["reasoning_accuracy_reward"]:
        (found,) = math.accuracy([None], [case["completion"]], solution=[case["solution"]], after="</think>")
        if case["solution"] != "none":  # theirs gives 0 or None by which of the two it sees first
            assert found == case["out"], case


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", r"(3, \pi)"),
        ("p - q", "-q + p", "q - p"),
        ("6 - 5i", "-5i + 6", "6"),
        (r"\sqrt{51}", r"51^{1/2}", "51"),
        (r"\text{Evelyn}", r"\text{Evelyn}", r"\text{Carla}"),
        ("1,000", "1000", "1"),
        (r"\$36", "36", "37"),
        ("$36$", "36", "37"),
        (18, "18.0", "81"),
        (GOLD, "2125", "2000"),
    ],
)
def test_an_answer_may_be_bare(answer, right, wrong):
    assert [of(math.accuracy, rf"so it is \boxed{{{text}}}.", answer) for text in (right, wrong)] == [1, 0]


def test_each_row_has_the_answer_that_it_gives():
    rows = dict(answer=["1", None, None, "?? $ ??"], solution=["$2$", "$2$", None, "$2$"])
    assert math.accuracy([None] * 4, [r"\boxed{2}"] * 4, **rows) == [0, 1, None, None]
    with pytest.raises(ValueError, match="needs a column answer or solution with the right answer; the rows have a, b"):
        math.accuracy([None], [""], a=[1], b=[2])


@pytest.mark.parametrize(
    "text", [ISSUE_65, r"\boxed{10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}}", r"\boxed{9^{9^9}}"]
)
def test_what_hangs_math_verify_is_wrong_or_equal_or_unknown(text):
    begun = time.monotonic()
    assert of(math.accuracy, text, "16") == 0
    assert of(math.accuracy, text, text) == 1
    assert of(math.accuracy, r"\boxed{16}", text) is None
    assert time.monotonic() - begun < 30  # seconds; it would not end


@pytest.mark.parametrize(
    "text",
    [r"(10^9)!", r"\binom{10^9}{5 \cdot 10^8}", r"\sum_{n=1}^{10^{12}} \frac{1}{n^2}", r"((9^9)^{9999})^{9999}"]
    + [r"\prod_{k=1}^{10^9} k", r"2^{-10^{12}}", "(x+y+1)^{20000}", "5^{5^{5^{x}}}", ALSO_65],
)
def test_other_answers_that_would_take_for_ever_are_wrong(text):
    begun = time.monotonic()
    assert of(math.accuracy, rf"\boxed{{{text}}}", "92.5857658508735") == 0
    assert time.monotonic() - begun < 30


def test_large_numbers_that_can_be_written_out_are_compared():
    for text, answer in (("2^{2009}", str(2**2009)), ("20!", "2432902008176640000"), (r"\binom{20}{10}", "184756")):
        assert of(math.accuracy, rf"\boxed{{{text}}}", answer) == 1
    assert of(math.accuracy, r"\boxed{\log_{10}(1000000)}", "6") == 1
    assert of(math.accuracy, r"\boxed{10^{2011}+1}", "10^{2011}") == 0


def test_it_works_beside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(of(math.accuracy, r"\boxed{2}", "2")))
    thread.start()
    thread.join()
    assert found == [1]


def test_of_a_completion_nothing_but_digits_is_evaluated(monkeypatch):
    evaluated, real = [], builtins.eval

    def spy(code, *names):
        evaluated.append(code if isinstance(code, str) else "* compiled")
        return real(code, *names)

    monkeypatch.setattr(builtins, "eval", spy)
    forms = (r"\boxed{%s}", r"\boxed{\text{%s}}", r"\boxed{\mathrm{%s} + 7.5}", "The answer is %s", "answer: $7+%s$")
    for form in forms:
        of(math.accuracy, form % "__import__('os').getpid()", "$49$")
        of(math.accuracy, form % "7*(7+8)**9", "$49$")
    assert not [code for code in evaluated if "getpid" in code or "*" in code]
    math.accuracy([None], [r"\boxed{105}"], solution=["7*(7+8)"])  # of a row's own solution it may be
    assert [code for code in evaluated if "*" in code]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (math.gsm8k, {"method": "loose"}, "method='loose': expected strict"),
        (math.number, {"pattern": "(a"}, "is no regular expression"),
        (math.number, {"pattern": "a"}, "has no group"),
    ],
)
def test_options_are_checked_before_there_is_a_completion(function, options, message):
    with pytest.raises(ValueError, match=message):
        function([], [], [], **options)


def test_a_missing_math_verify_is_named_before_there_is_a_completion(monkeypatch):
    math._math_verify.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxalign\[math\]'"):
        math.accuracy([], [], answer=[])


def test_a_column_named_like_an_option_is_not_it():
    columns = {
        "answer": ["7", "8"],
        "tolerance": ["x", "y"],
        "pattern": [1, 2],
        "target": [1, 2],
        "keywords": ["a", "b"],
    }
    with rewards.load(
        ["number", "length", "keyword"], {"length": {"target": 1}, "keyword": {"keywords": ["7"]}}
    ) as scores:
        found = scores([""] * 2, ["7", "7"], columns, completion_ids=[[5], [5, 5]])
    np.testing.assert_array_equal(found.values, [[1, 1, 1], [0, 0, 1]])
    assert not found.errors.any()
