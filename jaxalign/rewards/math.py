"""Rewards of right answers: GSM8K's, a number, and mathematics in LaTeX. The signature is that of rewards/format.py.

A row's answer that is none (no number, no mathematics) makes its rewards None; a completion without an answer has 0.
"""

import functools
import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from jaxalign.rewards.format import Completion, text_of

_DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(rf"-?\$?{_DIGITS}")
_FINAL = re.compile(rf"####\s*(-?\$?{_DIGITS})")
_PLAIN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_MATHS = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")

MAX_BITS = 100_000
"""Of the integers that `accuracy` lets a comparison write out: about 30,000 digits."""


def gsm8k(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    method: str = "strict",
    window: int = 300,
    **columns: Any,
) -> list[float | None]:
    """1 where a completion's answer is the number behind the last #### of the row's `answer`, else 0.

    The extraction is verl's and lm-evaluation-harness's. `$`, thousands separators and a period at the end don't count;
    those two compare what is left as text, this as numbers, so that 18.00 is 18.

    Args:
      answer: GSM8K's solutions, or bare numbers.
      method: "strict": the completion's answer is its last `#### number`; "flexible": its last number.
      window: characters at a completion's end that are searched, as verl's 300; 0: all of it.

    Raises:
      ValueError: `method` is another word.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"method={method!r}: expected strict (the last #### number) or flexible (the last number)")
    pattern = _FINAL if method == "strict" else _NUMBER
    found = [_last(pattern, text_of(completion)[-window:]) for completion in completions]
    return _equal(found, answer, 0.0)


def number(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    pattern: str | None = None,
    tolerance: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """1 where the completion is the row's `answer` and nothing else, else 0.

    Args:
      answer: numbers, or texts that are one (behind their last #### if there is one).
      pattern: a regular expression whose last match's first group is to be the number instead, e.g.
        "<answer>(.*?)</answer>"; a dot matches line breaks too.
      tolerance: the difference allowed, as a share of the answer where that is above 1.

    Raises:
      ValueError: `pattern` is no regular expression with a group.
    """
    texts = [text_of(completion) for completion in completions]
    if pattern is not None:
        try:
            wanted = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error
        if not wanted.groups:
            raise ValueError(f"pattern={pattern!r} has no group (...) around the number")
        texts = [next((match[1] or "" for match in reversed([*wanted.finditer(text)])), "") for text in texts]
    return _equal(texts, answer, tolerance)


def number_flexible(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    tolerance: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """1 where the last number of the completion is the row's `answer`, else 0; `answer`, `tolerance` as in `number`."""
    return _equal([_last(_NUMBER, text_of(completion)) for completion in completions], answer, tolerance)


def accuracy(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    *,
    after: str = "",
    **columns: Any,
) -> list[float | None]:
    r"""1 where a completion's answer equals the row's as mathematics (math-verify), else 0; TRL's `accuracy_reward`.

    A completion's answer is LaTeX: what it boxes (several boxes are a set), else what stands between dollars and the
    like behind "answer". The row's is the column `answer`, bare, in dollars, or GSM8K's; else `solution`, a text with
    its answer in it. A completion is read by LaTeX's grammar alone: of what it wrote, sympy evaluates digits.

    math-verify's own time limit is off: it needs the main thread, and does not end what hangs within one operation on
    integers (its issue 65). Answers that would write out an integer of more than MAX_BITS are compared as text alone:
    None where that is the row's answer, as nobody can tell, 0 where it is the completion's. What hangs for another
    reason is ended with its worker (rewards/run.py).

    Args:
      after: a completion is judged by what stands behind the last of these, e.g. "</think>", and is wrong without it.

    Raises:
      ValueError: neither column is there, or the package math-verify is not.
    """
    if answer is None and solution is None:
        raise ValueError(
            "the reward math needs a column answer or solution with the right answer; the rows have "
            f"{', '.join(columns) or 'no columns'}"
        )
    library = _math_verify()
    bare = answer if answer is not None else [None] * len(completions)
    whole = solution if solution is not None else [None] * len(completions)
    return [
        _verified(library, text_of(completion), after, _maths(a) if a is not None else s)
        for completion, a, s in zip(completions, bare, whole, strict=True)
    ]


def _last(pattern: re.Pattern[str], text: str) -> str:
    """What the pattern finds last, "" for nothing."""
    return next(reversed(pattern.findall(text)), "")


def _equal(found: Sequence[str], answers: Sequence[Any], tolerance: float) -> list[float | None]:
    rewards: list[float | None] = []
    for text, answer in zip(found, answers, strict=True):
        key, value = _value(str(answer).rpartition("####")[2]), _value(text)
        if key is None:
            rewards.append(None)
        else:
            allowed = Decimal(str(tolerance)) * max(Decimal(1), abs(key))
            rewards.append(float(value is not None and abs(value - key) <= allowed))
    return rewards


def _value(text: str) -> Decimal | None:
    """The number that a text is, None for another text."""
    plain = text.strip().replace("$", "").replace(",", "")
    return Decimal(plain) if _PLAIN.fullmatch(plain) else None


def _maths(answer: Any) -> str:
    """An `answer` as LaTeX that math-verify finds."""
    text = str(answer).rpartition("####")[2].strip()
    return text if _MATHS.search(text) else rf"\boxed{{{text}}}"


def _verified(library: Any, text: str, after: str, answer: Any) -> float | None:
    gold = [] if answer is None else library.parse(str(answer), parsing_timeout=None)
    if not gold:
        return None
    if after:
        text = text.rpartition(after)[2] if after in text else ""
    found = library.parse(text, [_written()], extraction_mode="first_match", parsing_timeout=None)
    if {entry.strip() for entry in gold if isinstance(entry, str)}.intersection(
        entry.strip() for entry in found if isinstance(entry, str)
    ):
        return 1.0
    if any(_bits(entry) > MAX_BITS for entry in gold):
        return None
    if any(_bits(entry) > MAX_BITS for entry in found):
        return 0.0
    return float(library.verify(gold, found, timeout_seconds=None))


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(
            f"the reward math needs the package math-verify ({error}): pip install 'jaxalign[math]'"
        ) from error
    for name in ("parser", "grader"):  # they warn that their time limit is off, as it is to be
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    return math_verify


@functools.cache
def _written() -> Any:
    """How a completion has to write its answer, as TRL has it: well-formed LaTeX, boxed or announced."""
    library = _math_verify()
    return library.LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=library.LatexNormalizationConfig(units=True),
    )


def _bits(expression: Any) -> float:
    """About the bits of the largest integer, or the terms, that evaluating an expression writes out."""
    import sympy

    if isinstance(expression, sympy.Rational):
        return max(int(expression.p).bit_length(), int(expression.q).bit_length())
    sizes = [_bits(part) for part in getattr(expression, "args", ())] or [1.0]
    if isinstance(expression, sympy.Pow):
        base, power = expression.args
        value = abs(float(power)) if power.is_Integer and sizes[1] < 64 else 2.0 ** min(sizes[1], 64)
        expanded = len(base.free_symbols) if base.has(sympy.Add) else 0  # a simplification may multiply a sum out
        return sizes[0] * max(value, 1.0) ** (1 + expanded)
    if isinstance(expression, sympy.factorial | sympy.binomial | sympy.gamma | sympy.Sum | sympy.Product):
        return max(sizes) * 2.0 ** min(max(sizes), 64)
    return sum(sizes) if isinstance(expression, sympy.Mul | sympy.Add) else max(sizes)
