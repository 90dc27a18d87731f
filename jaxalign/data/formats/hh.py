"""Anthropic's HH-RLHF in its raw form: two transcripts that share all but the last turn of the assistant."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxalign.data.formats.example import Example, Message, Messages, RowError, chat_example, read_label, read_text

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def hh(row: Mapping[str, Any]) -> Example:
    """Reads `chosen` and `rejected`, transcripts whose turns begin with `\\n\\nHuman:` and `\\n\\nAssistant:`; or the
    unpaired form, a transcript `prompt` that ends with `\\n\\nAssistant:`, its `completion` and its `label`.

    The prompt is everything up to the last `\\n\\nAssistant:`, as chat messages without the blanks around each turn.
    Raises RowError if the histories differ, an answer is blank, the turns do not alternate, or a turn holds a marker
    (an annotator typed it, so nobody knows where that turn ended).
    """
    if isinstance(row, Mapping) and "completion" in row:
        dialogue = _dialogue("completion", read_text(row, "prompt") + read_text(row, "completion"))
        _check_turns(dialogue)
        return replace(chat_example(dialogue[:-1], {"completion": dialogue[-1:]}), label=read_label(row))
    chosen, rejected = (_dialogue(name, read_text(row, name)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError("the histories differ", f"{len(chosen)} turns in chosen, {len(rejected)} in rejected")
    _check_turns(chosen, rejected[-1:])
    if chosen == rejected:
        raise RowError("chosen and rejected are equal")
    return chat_example(chosen[:-1], {"chosen": chosen[-1:], "rejected": rejected[-1:]}, conversation=True)


def _check_turns(dialogue: Messages, others: Sequence[Message] = ()) -> None:
    turns = [*dialogue, *others]
    if any("Human:" in turn["content"] or "Assistant:" in turn["content"] for turn in turns):
        raise RowError("a turn holds 'Human:' or 'Assistant:'")
    roles = [turn["role"] for turn in dialogue]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise RowError("wrong roles", f"the turns are {', '.join(roles)}")
    if not all(turn["content"] for turn in turns):
        raise RowError("a turn of the history is blank")


def is_transcript(value: Any) -> bool:
    """Whether a value looks like an HH transcript."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _dialogue(name: str, text: str) -> Messages:
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
