"""Rows of data sets -> examples: pure functions `row -> Example | list[Example] | None`, by name in FORMATS.

A row that a format cannot read raises RowError; None leaves a row out. A new format is a function and an entry.
Formats of a user's own go before these: see `data.transform`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.data.formats.example import LEFT_OUT, Example, Messages, RowError, read_number
from jaxalign.data.formats.hh import hh, is_transcript
from jaxalign.data.formats.kinds import KINDS, LABELLED, TRAIN_ON, convert
from jaxalign.data.formats.pairs import extract_prompt, pairs, triples
from jaxalign.data.formats.singles import alpaca, dolly, gsm8k, math, messages, prompt_completion, prompts, text

__all__ = [
    "FORMATS",
    "KINDS",
    "LABELLED",
    "LEFT_OUT",
    "TRAIN_ON",
    "Example",
    "Messages",
    "RowError",
    "convert",
    "default_format",
    "detect",
    "extract_prompt",
    "read",
    "read_number",
]

FORMATS: dict[str, Callable[..., Example | list[Example] | None]] = {
    "pairs": pairs,
    "triples": triples,
    "hh": hh,
    "prompt_completion": prompt_completion,
    "messages": messages,
    "prompts": prompts,
    "text": text,
    "dolly": dolly,
    "alpaca": alpaca,
    "gsm8k": gsm8k,
    "math": math,
}

# The columns that show a format with one response, the telling ones first.
_SINGLES = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
    "text": ("text",),
}


def read(row: Any, format: str, kind: str) -> list[Example]:
    """The examples of a kind that a row in a format gives; raises RowError if it is none."""
    if isinstance(row, str):
        raise RowError("not JSON", "the line cannot be read")
    found = FORMATS[format](row)
    if found is None:
        raise RowError(f"{LEFT_OUT} the format", format)
    examples = found if isinstance(found, list) else [found]
    return [new for example in examples for new in convert(example, kind)]


def detect(row: Any, kind: str = "pairs") -> str | None:
    """The name of the format that a row is in, for examples of a kind; None if it does not tell (columns missing, or
    None in them). A row may be in several: `chats` come from messages before they come from a pair, and so on."""
    if not isinstance(row, Mapping):
        return None
    two_sided, single = _two_sided(row, kind), _single(row)
    if kind in ("pairs", "triples"):
        return two_sided
    if kind == "prompts":
        return "prompts" if _is_prompt(row) else two_sided or single
    if kind in LABELLED and "label" not in row:
        return two_sided or single
    return single or two_sided


def default_format(kind: str) -> str:
    """The format whose errors say what a row lacks, where no row told its format."""
    named = {"pairs": "pairs", "triples": "triples", "chats": "messages", "prompts": "prompts"}
    return named.get(kind, "prompt_completion")


def _two_sided(row: Mapping[str, Any], kind: str) -> str | None:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if kind == "triples":
        return "triples" if isinstance(row.get("reference"), (str, list)) else None
    if "prompt" not in row and is_transcript(chosen) and is_transcript(rejected):
        return "hh"
    if isinstance(chosen, (str, list)) and isinstance(rejected, (str, list)):
        return "pairs"
    return None


def _is_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row names its prompt. Text beside the turns of a pair is no more than one of these."""
    if isinstance(row.get("prompt"), list) or isinstance(row.get("messages"), list):
        return True
    turns = [name for name in ("chosen", "completion") if isinstance(row.get(name), list)]
    return isinstance(row.get("prompt"), str) and not turns


def _single(row: Mapping[str, Any]) -> str | None:
    held = {name for name, value in row.items() if isinstance(value, (str, list))}
    for format, columns in _SINGLES.items():
        if held.issuperset(columns):
            return format
    if {"prompt", "response"} <= held or isinstance(row.get("completion"), list):
        return "prompt_completion"
    # A prompt and nothing that could answer it is a text to learn from (a pair's prompt is not).
    return "text" if isinstance(row.get("prompt"), str) and not {"chosen", "rejected"} & set(row) else None
