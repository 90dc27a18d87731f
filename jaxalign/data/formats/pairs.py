"""Preference pairs from the columns prompt, chosen and rejected, as text or as chat messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Message = dict[str, Any]
Messages = list[Message]
Side = TypeVar("Side", str, Messages)

ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: a few words without anything of the row in it; rows are counted by it.
        detail: what was found and what was expected.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Example:
    """One preference pair. Either all three are text (response text follows the prompt's text as it is), or all three
    are chat messages: the prompt ends with what the assistant answers, each response is the assistant's one message."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


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


def pairs(row: Mapping[str, Any]) -> Example:
    """Reads a row with `chosen` and `rejected`, and `prompt` unless both sides begin with it.

    Accepted: all text; all messages; messages whose sides repeat the whole prompt (given as messages or as the text of
    the last user turn) or come without a prompt column. Raises RowError for everything else.
    """
    chosen, rejected = read_side(row, "chosen"), read_side(row, "rejected")
    prompt = read_side(row, "prompt") if "prompt" in row else None
    if chosen == rejected:
        raise RowError("chosen and rejected are equal")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _of_text(prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return of_messages(*_split_messages(prompt, chosen, rejected))
    raise RowError("chosen and rejected are of different kinds", f"{_kind(chosen)} and {_kind(rejected)}")


def _of_text(prompt: str | Messages | None, chosen: str, rejected: str) -> Example:
    if prompt is None:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        if not prompt:
            raise RowError("no common prompt", "chosen and rejected do not begin alike, and there is no prompt column")
    if not isinstance(prompt, str):
        raise RowError("prompt and responses are of different kinds", "a list of messages and text")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RowError(f"{name} is empty or blank", "nothing is left after the common beginning")
    return Example(prompt, chosen, rejected)


def _split_messages(
    prompt: str | Messages | None, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Finds the prompt of two lists of messages (see `pairs`)."""
    if prompt is None:
        return extract_prompt(chosen, rejected)
    if isinstance(prompt, str):
        shared, own_chosen, own_rejected = extract_prompt(chosen, rejected)
        if shared and shared[-1]["role"] == "user" and shared[-1]["content"] == prompt:
            return shared, own_chosen, own_rejected
        raise RowError(
            "prompt and responses are of different kinds",
            "the prompt is text and is not the last user turn that chosen and rejected share",
        )
    size = len(prompt)
    if len(chosen) > size and len(rejected) > size and chosen[:size] == prompt == rejected[:size]:
        return prompt, chosen[size:], rejected[size:]
    return prompt, chosen, rejected


def of_messages(prompt: Messages, chosen: Messages, rejected: Messages) -> Example:
    """The example of these messages if a model can answer the prompt with either response, else raises RowError."""
    if not prompt:
        raise RowError("no common prompt", f"chosen begins with {_roles(chosen)}, rejected with {_roles(rejected)}")
    roles = [message["role"] for message in prompt]
    if "system" in roles[1:]:
        raise RowError("wrong roles", f"a system message is not the first one: {', '.join(roles)}")
    if roles[-1] not in ("user", "tool"):
        raise RowError("wrong roles", f"the prompt ends with {roles[-1]}, expected user or tool")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise RowError(
                "wrong roles", f"{name} after the prompt is {_roles(messages)}, expected one message of the assistant"
            )
        if not messages[0]["content"].strip():
            raise RowError(f"{name} is empty or blank")
    if chosen == rejected:
        raise RowError("chosen and rejected are equal")
    return Example(prompt, chosen, rejected)


def read_side(row: Mapping[str, Any], name: str) -> str | Messages:
    """The column's text or messages; raises RowError if it is neither, or empty."""
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object", f"the row is {_kind(row)}")
    if name not in row:
        raise RowError(f"no {name} column", f"the row has {', '.join(sorted(map(str, row))) or 'no columns'}")
    value = row[name]
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{name} is empty or blank")
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if not value:
            raise RowError(f"{name} is an empty list")
        return [_message(item, name) for item in value]
    raise RowError(f"{name} is {_kind(value)}", "expected text or a list of messages")


def _message(item: Any, name: str) -> Message:
    """A checked copy of one message; keys whose value is None (columns that a table filled up) are left out."""
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise RowError(f"{name} holds something that is no message", f"{_kind(item)}, expected role and content")
    message = {key: value for key, value in item.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError("wrong roles", f"{name} has the role {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"{name} has a message without text", f"its content is {_kind(content)}")
    return message


def _roles(messages: Messages) -> str:
    return ", ".join(message["role"] for message in messages) or "nothing"


def _kind(value: Any) -> str:
    """What a value is, in the words of a JSON file."""
    if value is None:
        return "None"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "NaN" if value != value else "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, Sequence) else f"of type {type(value).__name__}"
