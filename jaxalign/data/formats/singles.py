"""Rows with one response or none: prompt and completion, chat messages, instructions, prompts, plain text."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxalign.data.formats.example import (
    Example,
    RowError,
    chat_example,
    read_label,
    read_side,
    read_text,
)
from jaxalign.data.formats.pairs import read_sides


def prompt_completion(row: Mapping[str, Any]) -> Example:
    """Reads `prompt` and `completion` (or `response`), and `label` where the row has it.

    Both are text, or both chat messages; the completion may repeat the prompt's messages, and if it does the prompt may
    be missing or be the text of the last user turn.
    """
    name = "response" if "response" in row and "completion" not in row else "completion"
    return replace(read_sides(row, (name,)), label=read_label(row))


def messages(row: Mapping[str, Any]) -> Example:
    """Reads a conversation from `messages`, and `label` where the row has it. The response is the assistant's last
    turn; what others say after it is left out."""
    turns = read_side(row, "messages")
    if isinstance(turns, str):
        raise RowError("messages is text", "expected a list of messages")
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowError("no turn of the assistant")
    if not all(turns[at]["content"].strip() for at in answers):
        raise RowError("a turn of the assistant is blank")
    last = answers[-1]
    example = chat_example(turns[:last], {"the last turn": [turns[last]]}, conversation=True)
    return replace(example, label=read_label(row))


def prompts(row: Mapping[str, Any]) -> Example:
    """Reads a prompt without a response: `prompt` as messages (the assistant goes on with a turn of its own that ends
    them), else the turns of `messages` before the assistant's last one, else `prompt` as text."""
    columns = row if isinstance(row, Mapping) else {}
    whole = isinstance(columns.get("messages"), list) and not isinstance(columns.get("prompt"), list)
    prompt = read_side(row, "messages" if whole else "prompt")
    if isinstance(prompt, str):
        return Example(prompt, ())
    roles = [turn["role"] for turn in prompt]
    if whole and "assistant" in roles:
        last = len(roles) - 1 - roles[::-1].index("assistant")
        prompt, roles = prompt[:last], roles[:last]
    if not roles or "system" in roles[1:] or roles[-1] not in ("user", "tool", "assistant"):
        raise RowError("wrong roles", f"the prompt is {', '.join(roles) or 'nothing'}, expected it to end with user")
    return Example(prompt, ())


def text(row: Mapping[str, Any]) -> Example:
    """Reads `text`, or a `prompt` that stands alone: plain text without a prompt."""
    return Example("", (read_text(row, "text" if "text" in row else "prompt"),))


def dolly(row: Mapping[str, Any]) -> Example:
    """Reads Dolly's `instruction`, `response` and `context` (may be missing or blank) as a user's turn and its
    answer."""
    return _instruction(row, "instruction", "context", "response")


def alpaca(row: Mapping[str, Any]) -> Example:
    """Reads Alpaca's `instruction`, `output` and `input` (may be missing or blank) as a user's turn and its answer."""
    return _instruction(row, "instruction", "input", "output")


def gsm8k(row: Mapping[str, Any]) -> Example:
    """Reads GSM8K's `question` and `answer` as a user's turn and its answer."""
    return _instruction(row, "question", None, "answer")


def math(row: Mapping[str, Any]) -> Example:
    """Reads MATH's `problem` and `solution` as a user's turn and its answer."""
    return _instruction(row, "problem", None, "solution")


def _instruction(row: Mapping[str, Any], asked: str, more: str | None, answer: str) -> Example:
    content = read_text(row, asked)
    if more is not None and row.get(more) not in (None, "") and not str(row[more]).isspace():
        content += "\n\n" + read_text(row, more)
    said = [{"role": "assistant", "content": read_text(row, answer)}]
    return chat_example([{"role": "user", "content": content}], {answer: said})
