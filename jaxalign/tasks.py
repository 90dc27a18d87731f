"""How well a model does a task: sampled answers to its prompts, their rewards, and what these come to.

Letters: P prompts, N answers to each, F rewards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import metrics
from jaxalign.actor import Actor, seed_of
from jaxalign.data.sources import Prepared
from jaxalign.metrics import Z

_SLOTS_AT_ONCE = 4  # answers that are sampled before the next are rewarded and told of, in slots of the sampler


class Answers(NamedTuple):
    """N answers to each of P prompts.

    places [P]: of the prompts in the prepared rows. texts [P][N], without special tokens. tokens [P, N] int: their
    number. finished [P, N] bool: not cut off by a limit. rewards [P, N, F] float32, NaN where there is none. failed
    [P, N, F] bool: a reward function did.
    """

    places: np.ndarray
    texts: list[list[str]]
    tokens: np.ndarray
    finished: np.ndarray
    rewards: np.ndarray
    failed: np.ndarray


def answer(
    actor: Actor,
    params: Any,
    prepared: Prepared,
    *,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    tell: Callable[[Answers], object] = lambda answers: None,
) -> Answers:
    """Samples n answers to each prompt and rewards them. On several processes all call it alike.

    Args:
      params: the model's whole weights.
      prepared: of kind `prompts`.
      temperature: 0 is greedy.
      seed: what is drawn depends on it, on the prompt's place among how many, and on n and the actor's slots.
      tell: hears of a few prompts at a time, as soon as they are answered.
    """
    # Parts of about one size, so that each fills the slots: the programs of all are the same.
    n_parts = math.ceil(len(prepared) / max(_SLOTS_AT_ONCE * actor.slots // n, 1))
    parts = []
    for split in np.array_split(np.arange(len(prepared)), n_parts):
        places = split.tolist()
        sampled = actor.sample(params, prepared, places, seed_of(seed, places[0]), n=n, temperature=temperature)
        rewards, failed = actor.reward(prepared, places, sampled)
        shape = len(places), n
        parts.append(
            Answers(
                np.asarray(places),
                [sampled.texts[at : at + n] for at in range(0, len(sampled.texts), n)],
                np.array([len(ids) for ids in sampled.tokens]).reshape(shape),
                np.asarray(sampled.ended).reshape(shape),
                rewards.reshape(*shape, -1),
                failed.reshape(*shape, -1),
            )
        )
        tell(parts[-1])
    answered, tokens, finished, rewards, failed = (
        np.concatenate([getattr(part, name) for part in parts]) for name in Answers._fields if name != "texts"
    )
    texts = [texts for part in parts for texts in part.texts]
    return Answers(answered, texts, tokens, finished, rewards, failed)


def records(answers: Answers, prepared: Prepared, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each answer: the source row's columns, prompt, completion, sample (its number), a column for each
    reward by its name (None where there is none), tokens, finished."""
    for p, place in enumerate(answers.places.tolist()):
        columns = {name: value for name, (value,) in prepared.columns([place]).items()}
        for j, text in enumerate(answers.texts[p]):
            rewards = [None if math.isnan(value) else value for value in answers.rewards[p, j].tolist()]
            yield {
                **columns,
                "prompt": prepared.asked(place),
                "completion": text,
                "sample": j,
                **dict(zip(names, rewards, strict=True)),
                "tokens": int(answers.tokens[p, j]),
                "finished": bool(answers.finished[p, j]),
            }


def summary(
    values_PN: np.ndarray, failed_PN: np.ndarray | None = None, *, threshold: float = 1.0, name: str = ""
) -> dict[str, float]:
    """What the values of one reward say: means over prompts, each with `..._se` and its 95% interval, `..._low` and
    `..._high`.

    An answer is right where its value is at least `threshold`; one whose reward failed is wrong. A prompt that the
    reward does not apply to (NaN for all its answers, none of which failed) is left out.

    Returns:
      `accuracy` of one answer a prompt; of several `mean@N`, the share that is right, and `pass@k` for k = 2, 4, ...
      and N, how often at least one of k is. `reward`, the mean value; `prompts`, their number; `error_rate`, the share
      of answers whose reward failed. All behind "name/" if there is a name, NaN where nothing is known.
    """
    values = np.asarray(values_PN, np.float64)
    failed = np.zeros(values.shape, bool) if failed_PN is None else np.asarray(failed_PN)
    asked = (~np.isnan(values) | failed).any(axis=1)
    prefix = f"{name}/" if name else ""
    found = {f"{prefix}prompts": float(asked.sum()), f"{prefix}error_rate": float(failed.mean())}
    values = values[asked]
    right, n = values >= threshold, values.shape[1]
    if n == 1:
        found |= _share(f"{prefix}accuracy", right.mean(axis=1), 1)
    else:
        found |= _share(f"{prefix}mean@{n}", right.mean(axis=1), n)
        for k in sorted({*(2**i for i in range(1, n.bit_length())), n}):
            found |= _share(f"{prefix}pass@{k}", pass_at_k(right, k), n)
    known = ~np.isnan(values)
    rewards = [row[is_known].mean() for row, is_known in zip(values, known, strict=True) if is_known.any()]
    mean, error = metrics.mean_se(rewards or [math.nan])
    return found | _with_errors(f"{prefix}reward", mean, error, mean - Z * error, mean + Z * error)


def pass_at_k(right_PN: np.ndarray, k: int) -> np.ndarray:
    """[P]: the probability that of k answers drawn from the N at least one is right, 1 - C(N - c, k) / C(N, k) with c
    right ones: unbiased for k new answers (Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1)."""
    n = right_PN.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers a prompt: k is at least 1 and at most as many as there are")
    wrong_P = n - right_PN.sum(axis=1)
    i = np.arange(k)
    return 1 - np.prod((wrong_P[:, None] - i) / (n - i), axis=1)  # 0 / ... is a factor where fewer than k are wrong


def _share(name: str, share_P: np.ndarray, n: int) -> dict[str, float]:
    """The mean of prompts' shares with Wilson's interval.

    It is that of as many independent trials as have the mean's error (Korn and Graubard 1998, Survey Methodology 24):
    one for each prompt where its share is 0 or 1, and up to n of them where n answers tell it better.
    """
    if not len(share_P):
        return _with_errors(name, math.nan, math.nan, math.nan, math.nan)
    mean, variance, prompts = float(share_P.mean()), float(share_P.var()), len(share_P)
    trials = float(prompts)
    if 0 < mean < 1:
        trials *= min(mean * (1 - mean) / variance, n) if variance > 0 else n
    low, high = metrics.wilson(min(mean * trials, trials), trials)
    return _with_errors(name, mean, math.sqrt(mean * (1 - mean) / trials), low, high)


def _with_errors(name: str, mean: float, error: float, low: float, high: float) -> dict[str, float]:
    return {name: mean, f"{name}_se": error, f"{name}_low": low, f"{name}_high": high}
