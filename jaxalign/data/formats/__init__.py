"""Rows of data sets -> examples: pure functions `row -> Example | list[Example] | None`, by name in FORMATS.

A row that a format cannot read raises RowError; None leaves a row out. A new format is a function and an entry.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.data.formats.hh import hh, is_transcript
from jaxalign.data.formats.pairs import Example, Messages, RowError, extract_prompt, pairs

__all__ = ["FORMATS", "Example", "Messages", "RowError", "detect", "extract_prompt", "hh", "pairs"]

FORMATS: dict[str, Callable[..., Example | list[Example] | None]] = {"pairs": pairs, "hh": hh}


def detect(row: Any) -> str | None:
    """The name of the format that a row is in, or None if it does not tell (columns missing, or None in them)."""
    if not isinstance(row, Mapping):
        return None
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" not in row and is_transcript(chosen) and is_transcript(rejected):
        return "hh"
    if isinstance(chosen, (str, list)) and isinstance(rejected, (str, list)):
        return "pairs"
    return None
