"""Phrases that error messages share."""

import difflib
from collections.abc import Iterable, Sequence


def listed(items: Sequence[str], limit: int = 20) -> str:
    """The items joined by commas; of more than `limit` the first ones, and how many more there are."""
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown word: the choice that looks like it, or nothing."""
    near = difflib.get_close_matches(word, choices, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
