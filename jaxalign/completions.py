"""Prompts -> completions as text: chat templates, stop strings, and callbacks that hear while it is sampled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import detokenize, hf, sampling
from jaxalign.data import chat
from jaxalign.models import ModelConfig, Params

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
"""Text, chat messages, or token ids that stand as they are."""

TEXT_SEGMENT = 4  # tokens between two pieces of text


class Completion(NamedTuple):
    """One completion: its text without special tokens and stop string, its token ids, and whether it ended by itself
    (with a stop id or stop string)."""

    text: str
    tokens: list[int]
    finished: bool


def complete(cfg: ModelConfig, params: Params, tokenizer: Any, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    """The texts of completions; `options` and errors are those of `stream`, of which `max_new_tokens` is needed."""
    return [completion.text for completion in stream(cfg, params, tokenizer, prompts, **options)]


def stream(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | tuple[int, int],
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    bad_words: Sequence[str] = (),
    seed: int = 0,
    n: int = 1,
    batch_size: int = 8,
    raw: bool = False,
    prompt_room: int = 0,
    on_text: Callable[[int, str], object] | None = None,
    on_completion: Callable[[int, Completion], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> list[Completion]:
    """n completions of each prompt, in order: sample j of prompt p is number p * n + j. Callbacks hear while it runs.

    Args:
      params: as `models.apply` takes them; on a mesh, call this under `sharding.use_mesh`, in every process alike.
      prompts: text is one user turn of a chat (where the tokenizer has a chat template), messages go through the
        template, token ids stand as they are. A prompt given several times is sampled anew each time.
      max_new_tokens: of each completion, or (low, high): each draws its own number of them, both included (see
        `draw_lengths`). Fewer where the model's context ends before.
      min_new_tokens: before them no stop id can come, and no stop string counts.
      temperature: 0 is greedy.
      top_k, top_p, min_p, repetition_penalty: see `filters.make_limits`; 0, 1, 0 and 1 switch them off.
      stop: texts that end a completion, wherever tokens begin and end; its text ends before them, its tokens after.
      stop_ids: None: the model's own (`hf.stop_ids`).
      bad_words: texts whose tokens are never sampled (`detokenize.bad_ids`).
      seed: with it completion i is fixed, whatever the other prompts are, at one batch_size.
      batch_size: completions that are sampled at once; the next one takes the place of one that ends.
      raw: text stands as it is, as the beginning of a document.
      prompt_room: prompts of up to so many tokens share their programs, in this call and in others.
      on_text: is called with a completion's number and the next piece of its text, as it is sampled: whole characters,
        nothing of a stop string. All pieces together are the completion's text.
      on_completion: is called with each completion, in order, as soon as it and those before it have ended.
      on_progress: is called with the numbers of ended completions and of all tokens, every now and then.

    Raises:
      ValueError: a prompt without tokens or without room for an answer, messages without a chat template, a number that
        makes no sense. Raised before anything is compiled.
    """
    low, high = length_bounds(max_new_tokens, min_new_tokens)
    for name, number in (("n", n), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    encoded = [_encode(cfg, tokenizer, prompt, number, raw) for number, prompt in enumerate(prompts)]
    if not encoded:
        return []
    texts, ids = detokenize.stops(tokenizer, stop, min_new_tokens=min_new_tokens)
    ends = {*(hf.stop_ids(cfg, tokenizer) if stop_ids is None else stop_ids), *ids}
    numbers = range(len(encoded) * n)
    room = np.repeat([cfg.max_position_embeddings - len(prompt) for prompt in encoded], n)
    max_new = np.minimum(draw_lengths(seed, numbers, low, high), room)
    limits = sampling.make_limits(
        len(numbers),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_new=max_new.tolist(),
        min_new=min_new_tokens,
        stop_ids=sorted(ends),
        bad_ids=detokenize.bad_ids(tokenizer, bad_words),
    )
    tokens: list[list[int]] = [[] for _ in numbers]
    shown = [0 for _ in numbers]
    completions: dict[int, Completion] = {}
    told = 0

    def hear(request: int, new: Sequence[int]) -> None:
        nonlocal told
        if request in completions:
            return  # what was sampled between a stop string and the next look at it
        tokens[request] += new
        kept = texts(tokens[request])
        ids = tokens[request][:kept]
        finished = kept is not None or ids[-1] in ends
        if finished or len(ids) >= max_new[request]:
            completions[request] = Completion(texts.text(ids, ended=finished), ids, finished)
        if on_text is not None:
            text = completions[request].text if request in completions else texts.settled(ids)
            if len(text) > shown[request]:
                on_text(request, text[shown[request] :])
                shown[request] = len(text)
        while on_completion is not None and told in completions:
            on_completion(told, completions[told])
            told += 1

    sampling.sample(
        cfg,
        params,
        encoded,
        sampling.request_keys(seed, numbers),
        limits,
        max_new_tokens=high,
        n=n,
        slots=batch_size,
        segment_tokens=sampling.SEGMENT if on_text is None else TEXT_SEGMENT,
        max_prompt_tokens=max(prompt_room, *map(len, encoded)),
        stop=texts if texts.strings else None,
        on_tokens=hear,
        on_progress=on_progress,
    )
    return [completions[number] for number in numbers]


def draw_lengths(seed: int, requests: Sequence[int], low: int, high: int) -> np.ndarray:
    """Each request's own number of new tokens [B] int32, uniform over low..high, from the seed and its number alone."""
    drawn = [np.random.default_rng((seed, request)).integers(low, high, endpoint=True) for request in requests]
    return np.array(drawn, np.int32)


def length_bounds(max_new_tokens: int | tuple[int, int], min_new_tokens: int) -> tuple[int, int]:
    """The smallest and the largest number of tokens at which a completion is cut."""
    low, high = max_new_tokens if isinstance(max_new_tokens, tuple) else (max_new_tokens, max_new_tokens)
    if not 1 <= low <= high:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1, or (low, high) from 1 up")
    if min_new_tokens > low:
        raise ValueError(
            f"min_new_tokens is {min_new_tokens}, more than max_new_tokens={low}: lower one, raise the other"
        )
    return low, high


def _encode(cfg: ModelConfig, tokenizer: Any, prompt: Prompt, number: int, raw: bool) -> list[int]:
    try:
        if isinstance(prompt, str):
            as_chat = not raw and chat.template_of(tokenizer) is not None
            turns = [{"role": "user", "content": prompt}]
            ids = chat.encode_prompt(tokenizer, turns if as_chat else prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            if raw:
                raise ValueError("chat messages need the chat template; give text, or leave raw off")
            ids = chat.encode_prompt(tokenizer, [dict(message) for message in prompt])  # type: ignore[arg-type]
        else:
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from error
    if not ids:
        raise ValueError(f"prompt {number} has no tokens; there is nothing to continue")
    if len(ids) >= cfg.max_position_embeddings:
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens, the model's context is {cfg.max_position_embeddings}; shorten it, "
            "so that an answer fits"
        )
    return ids
