"""Rows of data sets -> examples: pure functions `row -> Example | list[Example] | None`, by name in FORMATS.

A row that a format cannot read raises RowError; None leaves a row out. A new format is a function and an entry.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.data.formats.example import Example, Messages, RowError, read_number
from jaxalign.data.formats.hh import hh, is_transcript
from jaxalign.data.formats.kinds import KINDS, LABELLED, TRAIN_ON, convert
from jaxalign.data.formats.pairs import extract_prompt, pairs, triples
from jaxalign.data.formats.singles import alpaca, dolly, gsm8k, messages, prompt_completion, text

__all__ = [
    "FORMATS",
    "KINDS",
    "LABELLED",
    "TRAIN_ON",
    "Example",
    "Messages",
    "RowError",
    "convert",
    "default_format",
    "detect",
    "extract_prompt",
    "read_number",
]

FORMATS: dict[str, Callable[..., Example | list[Example] | None]] = {
    "pairs": pairs,
    "triples": triples,
    "hh": hh,
    "prompt_completion": prompt_completion,
    "messages": messages,
    "text": text,
    "dolly": dolly,
    "alpaca": alpaca,
    "gsm8k": gsm8k,
}

# The columns that show a format with one response, the telling ones first.
_SINGLES = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "gsm8k": ("question", "answer"),
    "text": ("text",),
}


def detect(row: Any, kind: str = "pairs") -> str | None:
    """The name of the format that a row is in, for examples of a kind; None if it does not tell (columns missing, or
    None in them). A row may be in several: `chats` come from messages before they come from a pair, and so on."""
    if not isinstance(row, Mapping):
        return None
    two_sided, single = _two_sided(row, kind), _single(row)
    if kind in ("pairs", "triples"):
        return two_sided
    if kind in LABELLED and "label" not in row:
        return two_sided or single
    return single or two_sided


def default_format(kind: str) -> str:
    """The format whose errors say what a row lacks, where no row told its format."""
    return {"pairs": "pairs", "triples": "triples", "chats": "messages"}.get(kind, "prompt_completion")


def _two_sided(row: Mapping[str, Any], kind: str) -> str | None:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if kind == "triples":
        return "triples" if isinstance(row.get("reference"), (str, list)) else None
    if "prompt" not in row and is_transcript(chosen) and is_transcript(rejected):
        return "hh"
    if isinstance(chosen, (str, list)) and isinstance(rejected, (str, list)):
        return "pairs"
    return None


def _single(row: Mapping[str, Any]) -> str | None:
    held = {name for name, value in row.items() if isinstance(value, (str, list))}
    for format, columns in _SINGLES.items():
        if held.issuperset(columns):
            return format
    if {"prompt", "response"} <= held or isinstance(row.get("completion"), list):
        return "prompt_completion"
    # A prompt and nothing that could answer it is a text to learn from (a pair's prompt is not).
    return "text" if isinstance(row.get("prompt"), str) and not {"chosen", "rejected"} & set(row) else None
