"""Anthropic's HH-RLHF in its raw form: two transcripts that share all but the last turn of the assistant."""

import re
from collections.abc import Mapping
from typing import Any

from jaxalign.data.formats.pairs import Example, Messages, RowError, of_messages, read_side

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def hh(row: Mapping[str, Any]) -> Example:
    """Reads `chosen` and `rejected`, transcripts whose turns begin with `\\n\\nHuman:` and `\\n\\nAssistant:`.

    The prompt is everything up to the last `\\n\\nAssistant:`, as chat messages without the blanks around each turn.
    Raises RowError if the histories differ, an answer is blank, the turns do not alternate, or a turn holds a marker
    (an annotator typed it, so nobody knows where that turn ended).
    """
    chosen, rejected = _dialogue(row, "chosen"), _dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("the histories differ", f"{len(chosen)} turns in chosen, {len(rejected)} in rejected")
    turns = [*chosen, rejected[-1]]
    if any("Human:" in turn["content"] or "Assistant:" in turn["content"] for turn in turns):
        raise RowError("a turn holds 'Human:' or 'Assistant:'")
    roles = [turn["role"] for turn in chosen]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise RowError("wrong roles", f"the turns are {', '.join(roles)}")
    if not all(turn["content"] for turn in turns):
        raise RowError("a turn of the history is blank")
    return of_messages(chosen[:-1], chosen[-1:], rejected[-1:])


def is_transcript(value: Any) -> bool:
    """Whether a value looks like an HH transcript."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _dialogue(row: Mapping[str, Any], name: str) -> Messages:
    text = read_side(row, name)
    if not isinstance(text, str):
        raise RowError(f"{name} is a list of messages", "the hh format reads transcripts; use the format pairs")
    before, *pieces = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not pieces:
        raise RowError(f"{name} is no transcript", "it does not begin with 'Human:'")
    messages = [
        {"role": _ROLE[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if messages[-1]["role"] != "assistant":
        raise RowError("wrong roles", f"{name} ends with a turn of the human")
    if not messages[-1]["content"]:
        raise RowError(f"{name} is empty or blank")
    return messages
