"""Rewards of how a completion is written: form, tags, length, repetition, keywords.

A reward of this package is `f(prompts, completions, column, ..., *, option=..., **columns) -> [C] floats or None`, with
TRL's meaning: the data's columns come before the star, one entry a completion, and options behind it. None says that
the reward does not apply to a completion. All are pure, and none imports JAX or runs what a model wrote.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""What a model answered: text where its prompt was text, messages where that was a chat."""

_INSIDE = r"(?:(?!</?(?:think|answer)>).)+"  # something, and none of the tags
PATTERNS = {
    # TRL's think_format_reward: one block of thoughts at the very beginning, anything behind it.
    "think": r"<think>(?!.*<think>).*?</think>.*",
    # Thoughts, then an answer, and nothing beside.
    "think_answer": rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*",
}
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def text_of(completion: Completion) -> str:
    """A completion's text; of messages what the assistant said last."""
    if isinstance(completion, str):
        return completion
    said = [message["content"] for message in completion if message.get("role", "assistant") == "assistant"]
    return said[-1] or "" if said else ""


def format(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    pattern: str = "think_answer",
    prefix: str = "",
    **columns: Any,
) -> list[float | None]:
    """1 where the whole completion has a form, else 0.

    Args:
      pattern: "think_answer" (<think>...</think><answer>...</answer>), "think" (TRL's think_format_reward), or a
        regular expression of the whole completion, in which a dot matches line breaks too.
      prefix: what the prompt has opened already, e.g. "<think>" where the chat template writes it.

    Raises:
      ValueError: `pattern` is no regular expression.
    """
    try:
        form = re.compile(PATTERNS.get(pattern, pattern), re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"pattern={pattern!r} is no regular expression ({error}); give one, or one of {', '.join(PATTERNS)}"
        ) from error
    return [float(form.fullmatch(prefix + text_of(completion)) is not None) for completion in completions]


def tags(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    tags: Sequence[str] = TAGS,
    prefix: str = "",
    **columns: Any,
) -> list[float | None]:
    """The share of `tags` that stand in the completion exactly once, like Open-R1's tag count; `prefix` as in `format`.

    Raises:
      ValueError: there are none, or they are one text.
    """
    if isinstance(tags, str) or not tags:
        raise ValueError(f"tags={tags!r}: expected a list of texts, e.g. {list(TAGS)}")
    texts = [prefix + text_of(completion) for completion in completions]
    return [sum(text.count(tag) == 1 for tag in tags) / len(tags) for text in texts]


def length(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    target: int,
    shape: str = "target",
    **columns: Any,
) -> list[float | None]:
    """A completion's number of tokens, in [0, 1].

    Args:
      target: tokens.
      shape: "target": 1 at `target`, falling linearly to 0 on both sides, at no tokens and at twice as many. "linear":
        the share of `target` that is left, 1 for no tokens and 0 from `target` on; a negative weight favours length.

    Raises:
      ValueError: `target` is no positive number, or `shape` is another word.
    """
    if target < 1 or shape not in ("target", "linear"):
        raise ValueError(
            f"target={target!r}, shape={shape!r}: expected a positive number of tokens, and target or linear"
        )
    shares = [len(ids) / target for ids in completion_ids]
    return [max(0.0, 1 - (abs(share - 1) if shape == "target" else share)) for share in shares]


def overlong(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_length: int,
    cache: int | None = None,
    **columns: Any,
) -> list[float | None]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): 0 up to `max_completion_length - cache` tokens,
    then falling linearly to -1 at `max_completion_length`, and -1 beyond.

    Args:
      max_completion_length: tokens; what the rollout allows, or less.
      cache: tokens; None: a fifth of it, as in the paper.

    Raises:
      ValueError: `cache` is not between 0 and `max_completion_length`.
    """
    cache = max_completion_length // 5 if cache is None else cache
    if not 0 <= cache <= max_completion_length:
        raise ValueError(f"cache={cache} tokens is not between 0 and max_completion_length={max_completion_length}")
    free = max_completion_length - cache
    return [
        0.0 if len(ids) <= free else -1.0 if len(ids) > max_completion_length else (free - len(ids)) / cache
        for ids in completion_ids
    ]


def repetition(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    **columns: Any,
) -> list[float | None]:
    """`max_penalty` times the share of a completion's n-grams of tokens that stood in it before (arXiv:2502.03373,
    appendix C.2); 0 for completions that are shorter than an n-gram.

    Raises:
      ValueError: `ngram_size` is below 1, or `max_penalty` above 0.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(
            f"ngram_size={ngram_size}, max_penalty={max_penalty}: expected at least 1 token, and a penalty of at most 0"
        )
    rewards: list[float | None] = []
    for ids in completion_ids:
        ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        rewards.append(max_penalty * repeated if repeated else 0.0)
    return rewards


def keyword(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    keywords: Sequence[str],
    ignore_case: bool = True,
    **columns: Any,
) -> list[float | None]:
    """The share of `keywords` that stand in the completion, as whole words; a negative weight makes them unwelcome.

    Raises:
      ValueError: there are none, or they are one text.
    """
    if isinstance(keywords, str) or not keywords:
        raise ValueError(f"keywords={keywords!r}: expected a list of words, e.g. ['sky', 'blue']")
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    words = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags) for word in keywords]
    texts = map(text_of, completions)
    return [sum(word.search(text) is not None for word in words) / len(words) for text in texts]
