"""What a row becomes, a prompt with its responses, and the error of a row that cannot become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Messages = list[Message]

LEFT_OUT = "left out by"
"""What the reason of a row begins with that nothing is wrong with: somebody does not want it."""

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
    """A prompt and responses to it. Either all are text (a response follows the prompt's text as it is), or all are
    chat messages: the prompt ends with what the assistant answers, each response is the assistant's one message.

    Attributes:
        prompt: "" for a text that answers nothing.
        responses: (chosen, rejected), (chosen, rejected, reference), or the only one.
        label: whether the only response is a desirable one; None where the row does not say.
        conversation: the row is a whole dialogue that names no prompt: the assistant's turns in `prompt` are answers
            like the response.
    """

    prompt: str | Messages
    responses: tuple[str, ...] | tuple[Messages, ...]
    label: bool | None = None
    conversation: bool = False


def text_example(prompt: str | Messages, responses: Mapping[str, str]) -> Example:
    """The example of these texts, by the names of their columns; raises RowError if one is blank."""
    if not isinstance(prompt, str):
        raise RowError("prompt and responses are of different kinds", "a list of messages and text")
    for name, text in responses.items():
        if not text.strip():
            raise RowError(f"{name} is empty or blank", "nothing is left after the common beginning")
    return Example(prompt, tuple(responses.values()))


def chat_example(prompt: Messages, responses: Mapping[str, Messages], *, conversation: bool = False) -> Example:
    """The example of these messages, by the names of their columns, if a model can answer the prompt with each
    response; else raises RowError."""
    if not prompt:
        found = ", ".join(f"{name} begins with {roles_of(messages)}" for name, messages in responses.items())
        raise RowError("no common prompt" if len(responses) > 1 else "no prompt", found)
    roles = [message["role"] for message in prompt]
    if "system" in roles[1:]:
        raise RowError("wrong roles", f"a system message is not the first one: {', '.join(roles)}")
    if roles[-1] not in ("user", "tool"):
        raise RowError("wrong roles", f"the prompt ends with {roles[-1]}, expected user or tool")
    for name, messages in responses.items():
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            found = roles_of(messages)
            raise RowError("wrong roles", f"{name} after the prompt is {found}, expected one message of the assistant")
        if not messages[0]["content"].strip():
            raise RowError(f"{name} is empty or blank")
    return Example(prompt, tuple(responses.values()), conversation=conversation)


def read_side(row: Mapping[str, Any], name: str) -> str | Messages:
    """The column's text or messages; raises RowError if it is neither, or empty."""
    value = read_column(row, name)
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{name} is empty or blank")
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if not value:
            raise RowError(f"{name} is an empty list")
        return [_message(item, name) for item in value]
    raise RowError(f"{name} is {kind_of_value(value)}", "expected text or a list of messages")


def read_text(row: Mapping[str, Any], name: str) -> str:
    """The column's text; raises RowError if it is none, or blank."""
    value = read_side(row, name)
    if not isinstance(value, str):
        raise RowError(f"{name} is a list of messages", "expected text")
    return value


def read_column(row: Mapping[str, Any], name: str) -> Any:
    """The column's value; raises RowError if the row is no object or lacks it."""
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object", f"the row is {kind_of_value(row)}")
    if name not in row:
        raise RowError(f"no {name} column", f"the row has {', '.join(sorted(map(str, row))) or 'no columns'}")
    return row[name]


def read_number(row: Mapping[str, Any], name: str) -> float:
    """The column's number, which csv files hold as text; raises RowError if it is none, or not finite."""
    value = read_column(row, name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowError(f"{name} is {kind_of_value(value)}", "expected a number") from None
    if not abs(number) < float("inf"):
        raise RowError(f"{name} is {'infinite' if number == number else 'NaN'}", "expected a number")
    return number


# How csv files spell a label.
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def read_label(row: Mapping[str, Any]) -> bool | None:
    """Whether the row's response is desirable (true or 1; false or 0); None without a column `label`.

    Raises RowError if the label is anything else.
    """
    if "label" not in row:
        return None
    value = row["label"]
    label = (
        {"true": True, "1": True, "false": False, "0": False}.get(value.lower()) if isinstance(value, str) else value
    )
    if label not in (True, False):
        raise RowError(f"label is {kind_of_value(value)}", f"expected true or 1, false or 0; it is {value!r}")
    return bool(label)


def _message(item: Any, name: str) -> Message:
    """A checked copy of one message; keys whose value is None (columns that a table filled up) are left out."""
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise RowError(
            f"{name} holds something that is no message", f"{kind_of_value(item)}, expected role and content"
        )
    message = {key: value for key, value in item.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError("wrong roles", f"{name} has the role {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"{name} has a message without text", f"its content is {kind_of_value(content)}")
    return message


def roles_of(messages: Messages) -> str:
    """The roles of messages, for an error."""
    return ", ".join(message["role"] for message in messages) or "nothing"


def kind_of_value(value: Any) -> str:
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
