"""Preference pairs and triples from the columns prompt, chosen, rejected and reference, as text or chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxalign.data.formats.example import (
    Example,
    Messages,
    RowError,
    chat_example,
    kind_of_value,
    read_side,
    text_example,
)

Side = TypeVar("Side", str, Messages)


def pairs(row: Mapping[str, Any]) -> Example:
    """Reads a row with `chosen` and `rejected`, and `prompt` unless both sides begin with it.

    Accepted: all text; all messages; messages whose sides repeat the whole prompt (given as messages or as the text of
    the last user turn) or come without a prompt column. Raises RowError for everything else.
    """
    return read_sides(row, ("chosen", "rejected"))


def triples(row: Mapping[str, Any]) -> Example:
    """Reads a row of `pairs` that has a third response, `reference`: the gold one (TRL's columns for TPO)."""
    return read_sides(row, ("chosen", "rejected", "reference"))


def read_sides(row: Mapping[str, Any], names: Sequence[str]) -> Example:
    """The example of a row whose responses are the columns `names`, and whose prompt is the column `prompt` or what
    all of them begin with; of one response alone, all messages but the last."""
    sides = [read_side(row, name) for name in names]
    prompt = read_side(row, "prompt") if "prompt" in row else None
    _check_differ(sides)
    texts = [side for side in sides if isinstance(side, str)]
    if len(texts) == len(sides):
        if prompt is None:
            prompt = read_side(row, "prompt") if len(texts) == 1 else _common_prompt(texts)
            texts = [text[len(prompt) :] for text in texts]
            if not prompt:
                raise RowError("no common prompt", "the responses do not begin alike, and there is no prompt column")
        return text_example(prompt, dict(zip(names, texts, strict=True)))
    dialogues = [side for side in sides if isinstance(side, list)]
    if len(dialogues) == len(sides):
        shared, rests = _split_messages(prompt, dialogues)
        _check_differ(rests)
        return chat_example(shared, dict(zip(names, rests, strict=True)), conversation="prompt" not in row)
    found = " and ".join(kind_of_value(side) for side in sides)
    raise RowError(f"{' and '.join(names)} are of different kinds", found)


def extract_prompt(chosen: Side, rejected: Side) -> tuple[Side, Side, Side]:
    """Splits two whole dialogues into their common beginning and the two rests: (prompt, chosen, rejected).

    Messages: the common beginning is counted in messages. Text: in characters; a blank at the border goes to the
    responses. If one side is the beginning of the other, its last item stays out of the prompt. As TRL's
    `extract_prompt` does.
    """
    shortest = min(len(chosen), len(rejected))
    border = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
    if border > 0 and chosen[border - 1] == " ":
        border -= 1
    return chosen[:border], chosen[border:], rejected[border:]


def _check_differ(sides: Sequence[Any]) -> None:
    if len(sides) > 1 and sides[0] == sides[1]:
        raise RowError("chosen and rejected are equal")


def _common_prompt(sides: Sequence[Any]) -> Any:
    """What whole dialogues begin with, as text or messages."""
    if len(sides) == 1:
        return sides[0][:-1]
    prompt, *_ = extract_prompt(sides[0], sides[1])
    if any(side[: len(prompt)] != prompt for side in sides[2:]):
        raise RowError("no common prompt", "the reference does not begin with the prompt of chosen and rejected")
    return prompt


def _split_messages(prompt: str | Messages | None, sides: Sequence[Messages]) -> tuple[Messages, list[Messages]]:
    """Finds the prompt of lists of messages (see `pairs`): (prompt, the responses without it)."""
    if isinstance(prompt, list):
        size = len(prompt)
        repeated = all(len(side) > size and side[:size] == prompt for side in sides)
        return prompt, [side[size:] for side in sides] if repeated else list(sides)
    shared = _common_prompt(sides)
    if prompt is not None and not (shared and shared[-1]["role"] == "user" and shared[-1]["content"] == prompt):
        raise RowError(
            "prompt and responses are of different kinds",
            "the prompt is text and is not the last user turn that all responses begin with",
        )
    return shared, [side[len(shared) :] for side in sides]
