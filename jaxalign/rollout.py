"""The on-policy source: prompts -> the policy's own completions -> rewards -> advantages -> batches of a few updates.

A rollout is what is sampled at once: batch_size x steps_per_generation completions, num_generations of each prompt. It
serves steps_per_generation x num_iterations updates. Its prompts, keys and order depend on (config, seed, its number)
alone, its tokens on the weights besides, so a run that resumes between two rollouts makes the next one as it would have
been. Within a rollout it goes on with the one in use, which is in the checkpoint (`Rollouts.kept`).

Letters: C completions of a rollout, P prompts, G completions of a prompt, F rewards, T tokens of prompt and completion,
N tokens of a completion, R rows.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxalign import advantages, models, reference
from jaxalign.actor import Actor, seed_of
from jaxalign.data.batching import ExampleSource
from jaxalign.data.packing import Batch
from jaxalign.data.sources import Prepared

Score = Callable[["Rollout", models.Params, models.Params | None], Mapping[str, np.ndarray]]
"""(a rollout, the policy's weights, the reference's) -> `old_logps` and `ref_logps` of it, those that are needed."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What was sampled at once, padded to fixed shapes; an example of it is one completion, as of `Prepared`.

    Attributes:
      number: which rollout of the run, from 0; -1: none.
      replaced: groups without spread that gave way to others.
      prompts [C] int32: places in the prepared prompts.
      tokens [C, T] int32, mask [C, T] bool (True: sampled), lengths [C, 1], prompt_lengths [C] int32.
      sampling_logps, old_logps, ref_logps [C, T] float32: of the masked tokens, as the sampler had them, and scored
        then by the policy and its reference; 0 elsewhere, or where nobody asks (a user's function gives the first, NaN
        where it does not know).
      rewards [C, F] float32, NaN where there is none; failed [C, F] bool.
      advantages float32 [C], or [C, T] where they differ from token to token.
      truncated [C] float32: 1 where a limit ended the completion.
    """

    number: np.ndarray
    replaced: np.ndarray
    prompts: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    sampling_logps: np.ndarray
    old_logps: np.ndarray
    ref_logps: np.ndarray
    rewards: np.ndarray
    failed: np.ndarray
    advantages: np.ndarray
    truncated: np.ndarray

    kind: ClassVar[str] = "prompts"
    width: ClassVar[int] = 1
    pad_id: ClassVar[int] = 0

    @classmethod
    def empty(cls, completions: int, length: int, functions: int, *, of_tokens: bool = False) -> "Rollout":
        """A rollout of such shapes that is none; `of_tokens`: of the advantages."""
        c, t, f = (completions,), (completions, length), (completions, functions)
        ints, floats, bools = (functools.partial(np.zeros, dtype=dtype) for dtype in (np.int32, np.float32, bool))
        return cls(
            number=np.array(-1, np.int32),
            replaced=ints(()),
            prompts=ints(c),
            tokens=ints(t),
            mask=bools(t),
            lengths=ints((completions, 1)),
            prompt_lengths=ints(c),
            sampling_logps=floats(t),
            old_logps=floats(t),
            ref_logps=floats(t),
            rewards=floats(f),
            failed=bools(f),
            advantages=floats(t if of_tokens else c),
            truncated=floats(c),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def meta(self) -> Mapping[str, Any]:
        """As of `Prepared`."""
        return {"max_length": self.tokens.shape[1]}

    @property
    def values(self) -> Mapping[str, np.ndarray]:
        """What a batch says of each completion."""
        found = {"truncated": self.truncated}
        return found | ({"advantages": self.advantages} if self.advantages.ndim == 1 else {})

    def sequence(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of completion i with its prompt; j is 0."""
        n = int(self.lengths[i, j])
        return self.tokens[i, :n], self.mask[i, :n]

    @property
    def inside(self) -> np.ndarray:
        """[C, T] bool: the tokens that are no padding."""
        return np.arange(self.tokens.shape[1]) < self.lengths


class Rollouts:
    """The source of a run whose policy writes its own examples: `rollouts(step, params)` is the batch of that update.

    Attributes:
      updates: that a rollout serves.
      prompts_per_step: prompts of the data that an update uses up.
      rollout: the one in use.
      spent: seconds that making rollouts took, by part, since this was emptied.
    """

    def __init__(
        self,
        prepared: Prepared,
        actor: Actor,
        *,
        batch_size: int,
        num_generations: int,
        steps_per_generation: int = 1,
        num_iterations: int = 1,
        resample: int = 0,
        seed: int,
        weights: Sequence[float] = (),
        scale: str = "group",
        aggregation: str = "sum_then_normalize",
        estimator: str = "group",
        beta: float = 0.0,
        clip_range: tuple[float, float] | None = None,
        normalize: bool = False,
        score: Score = lambda rollout, params, ref_params: {},
        scored: Sequence[str] = (),
        sampling_logps: bool = True,
        corrects: bool = False,
        mask_truncated: bool = False,
        **layout: Any,
    ):
        """Args:
        batch_size: completions of an update, over all processes.
        resample: rounds of sampling further prompts in place of those whose completions all have one reward.
        weights, scale, aggregation, estimator, beta, clip_range, normalize: how rewards become advantages, see
          `advantages.combine`.
        score, scored: gives the log-probs named in `scored`: old_logps, ref_logps, both or none.
        sampling_logps: batches say how likely tokens were where they were sampled; NaN: not known.
        corrects: the loss corrects by these, so that some are to be known.
        mask_truncated: completions without an end cost no KL divergence, and their tokens count in no mean.
        layout: buckets, packing, packed_length, row_multiple and rows, as of `ExampleSource`.
        """
        self.prepared, self.actor, self.seed = prepared, actor, seed
        self._score, self.scored, self._layout = score, tuple(scored), layout
        self._sampling_logps, self._corrects, self._mask_truncated = sampling_logps, corrects, mask_truncated
        self._weights = np.asarray(weights or (1.0,) * len(actor.rewards.names), np.float32)
        self._combine: dict[str, Any] = {
            "num_generations": num_generations,
            "scale": scale,
            "aggregation": aggregation,
        }
        self._estimator: dict[str, Any] = {
            "estimator": estimator,
            "beta": beta,
            "clip_range": clip_range,
            "normalize": normalize,
        }
        self._batch_size, self._group, self._rounds = batch_size, num_generations, resample
        self._size = batch_size * steps_per_generation
        self.updates = steps_per_generation * num_iterations
        self.prompts_per_step = batch_size / num_generations / num_iterations
        self.rollout = self._empty
        self.spent: dict[str, float] = {}
        prompts = self._size // num_generations
        self._order = ExampleSource(prepared, batch_size=prompts, seed=seed)
        self._reserve = ExampleSource(prepared, batch_size=prompts, seed=seed_of(seed, 1))

    @property
    def _empty(self) -> Rollout:
        of_tokens = self._estimator["estimator"] == "reinforce_pp" and self._estimator["beta"] > 0
        functions = len(self.actor.rewards.names)
        return Rollout.empty(self._size, self.actor.max_length, functions, of_tokens=of_tokens)

    def __call__(self, step: int, params: models.Params, ref_params: models.Params | None = None) -> Batch:
        """The batch of update `step` (from 0), sampled with the whole weights `params` if it begins a rollout."""
        if not self.has(step):
            self.rollout = self._make(step // self.updates, params, ref_params)
        return self.batch(step)

    def has(self, step: int) -> bool:
        """Whether the rollout in use serves update `step`."""
        return int(self.rollout.number) == step // self.updates

    def batch(self, step: int) -> Batch:
        """The batch of an update that the rollout in use serves.

        Leaves: those of `packing.fill`; truncated [R, S]; advantages [R, S] or [R, T]; sampling_logps [R, T], where
        they are wanted; old_logps and ref_logps [R, T], those that are `scored`.
        """
        batch, rollout = self._source(step)(step % self.updates), self.rollout
        of_tokens = [*self.scored, *["sampling_logps"] * self._sampling_logps]
        if rollout.advantages.ndim == 2:
            of_tokens.append("advantages")
        for name in of_tokens:
            flat = getattr(rollout, name)[rollout.inside]
            batch[name] = reference.Cached(rollout, flat)(batch)  # type: ignore[arg-type]
        return batch

    def _source(self, step: int) -> ExampleSource:
        seed = seed_of(self.seed, 2, step // self.updates)
        return ExampleSource(self.rollout, batch_size=self._batch_size, seed=seed, **self._layout)  # type: ignore[arg-type]

    def slots_of(self, step: int) -> np.ndarray:
        """As `ExampleSource.slots_of`, in prompts of the data."""
        places = self._source(step).slots_of(step % self.updates)
        return np.where(places < 0, places, self.rollout.prompts[places])

    def steps(self, epochs: float) -> int:
        """Updates that use every prompt `epochs` times."""
        return int(np.ceil(round(epochs * len(self.prepared) / self.prompts_per_step, 6)))

    # ---- what a checkpoint keeps

    def kept(self, step: int) -> dict[str, np.ndarray]:
        """The rollout in the middle of which a run is after `step` updates, or one that is none."""
        rollout = self.rollout if step % self.updates and self.has(step) else self._empty
        return {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}

    def restore(self, kept: Mapping[str, np.ndarray]) -> None:
        """Takes up what `kept` gave."""
        self.rollout = Rollout(**{name: np.asarray(x) for name, x in kept.items()})

    # ---- sampling

    def _make(self, number: int, params: models.Params, ref_params: models.Params | None) -> Rollout:
        rollout = self._sampled(number, 0, self._order.examples_of(number), params)
        for i in range(self._rounds):
            (alike,) = np.nonzero(~self._has_spread(rollout.rewards))
            if not len(alike):
                break
            there = set(rollout.prompts.tolist())  # no prompt is to be in a rollout twice
            offered = [place for place in self._reserve.examples_of(number * self._rounds + i) if place not in there]
            others = np.array(list(dict.fromkeys(offered))[: len(alike)], int)
            if not len(others):
                continue
            fresh = self._sampled(number, i + 1, others, params)
            (useful,) = np.nonzero(self._has_spread(fresh.rewards))
            rollout = self._replaced(rollout, alike[: len(useful)], fresh, useful)
        if self.scored:
            with self._timed("score"):
                rollout = dataclasses.replace(rollout, **self._score(rollout, params, ref_params))
        counted = rollout.mask & ((rollout.truncated == 0)[:, None] | (not self._mask_truncated))
        drift = {"kl_CN": rollout.old_logps - rollout.ref_logps, "mask_CN": counted}
        found, _ = advantages.combine(rollout.rewards, self._weights, **self._combine, **self._estimator, **drift)
        return dataclasses.replace(rollout, advantages=np.asarray(found, np.float32))

    def _sampled(self, number: int, attempt: int, places: np.ndarray, params: models.Params) -> Rollout:
        """The completions of these prompts with their rewards, without advantages and old log-probs."""
        with self._timed("generate"):
            seed = seed_of(self.seed, 3, number, attempt)
            sampled = self.actor.sample(params, self.prepared, places, seed, n=self._group)
        if self._corrects and sampled.logps is None:
            raise ValueError(
                "loss.importance_sampling_correction compares with the log-probs that tokens were sampled with: have "
                "rollout.function return (token ids, mask, log-probs) for each row (generate.sample gives them), or "
                "set it to False"
            )
        with self._timed("reward"):
            rewards, failed = self.actor.reward(self.prepared, places, sampled)
        size = len(places) * self._group
        rollout = Rollout.empty(size, self.actor.max_length, len(self.actor.rewards.names))
        prompts = np.repeat(places, self._group).astype(np.int32)
        for c, (ids, mask) in enumerate(zip(sampled.tokens, sampled.masks, strict=True)):
            prompt = self.prepared.prompt(int(prompts[c]))
            rollout.prompt_lengths[c], rollout.lengths[c] = len(prompt), len(prompt) + len(ids)
            here = slice(len(prompt), len(prompt) + len(ids))
            rollout.tokens[c, : len(prompt)], rollout.tokens[c, here] = prompt, ids
            rollout.mask[c, here] = mask
            rollout.sampling_logps[c, here] = np.nan if sampled.logps is None else sampled.logps[c]
        return dataclasses.replace(
            rollout,
            number=np.array(number, np.int32),
            prompts=prompts,
            rewards=rewards,
            failed=failed,
            truncated=1 - sampled.ended.astype(np.float32),
        )

    def _has_spread(self, rewards_CF: np.ndarray) -> np.ndarray:
        """[P] bool: not all completions of the prompt have the same reward (or, where each function's rewards are
        normalised before they are summed, the same rewards)."""
        if self._combine["aggregation"] == "normalize_then_sum":
            counted = rewards_CF.T[self._weights != 0]
            return np.any([advantages.has_spread(values_C, self._group) for values_C in counted], axis=0)
        sums_C, clip_range = self.sums(rewards_CF), self._estimator["clip_range"]
        return advantages.has_spread(np.clip(sums_C, *clip_range) if clip_range else sums_C, self._group)

    def sums(self, rewards_CF: np.ndarray) -> np.ndarray:
        """What each completion's rewards come to, [C] float32; NaN where there is none."""
        return advantages.combine(rewards_CF, self._weights, num_generations=1)[1]

    def _replaced(self, rollout: Rollout, groups: np.ndarray, fresh: Rollout, others: np.ndarray) -> Rollout:
        """The rollout with as many `others` of the groups of `fresh` in place of its own `groups`."""
        at, of = ((np.arange(self._group) + self._group * x[:, None]).ravel() for x in (groups, others))
        changes = {"replaced": rollout.replaced + np.int32(len(groups))}
        for name in ("prompts", "tokens", "mask", "lengths", "prompt_lengths", "sampling_logps", "rewards", "failed",
                     "truncated"):  # fmt: skip
            column = getattr(rollout, name).copy()
            column[at] = getattr(fresh, name)[of]
            changes[name] = column
        return dataclasses.replace(rollout, **changes)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        name = f"time/{what}"
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

    # ---- what it shows

    def metrics(self) -> dict[str, float]:
        """What the rollout in use measured, under TRL's names."""
        rollout, names = self.rollout, self.actor.rewards.names
        found = advantages.summary(rollout.rewards, self._weights, names, **self._combine)
        for name, rate in zip(names, rollout.failed.mean(axis=0), strict=True):
            found[f"rewards/{name}/error_rate"] = float(rate)
        if self._rounds:
            found["rollout/replaced_groups"] = float(rollout.replaced)
        return found | lengths(rollout.mask.sum(axis=1), rollout.truncated > 0)

    def shown(self) -> list[dict[str, Any]]:
        """The rollout's first group as rows of completions.jsonl."""
        rollout, names = self.rollout, self.actor.rewards.names
        decode = functools.partial(self.actor.tokenizer.decode, skip_special_tokens=True)
        rows = []
        for c in range(self._group):
            border, (ids, _), advantage = int(rollout.prompt_lengths[c]), rollout.sequence(c, 0), rollout.advantages[c]
            if advantage.ndim:
                advantage = advantage[rollout.mask[c]].mean()
            rewards = dict(zip(names, map(_json, rollout.rewards[c]), strict=True))
            written = {"prompt": decode(ids[:border]), "completion": decode(ids[border:])}
            rows.append({**written, **rewards, "advantage": _json(advantage)})
        return rows


def lengths(tokens: np.ndarray, cut: np.ndarray) -> dict[str, float]:
    """TRL's `completions/*` of completions of so many tokens, of which `cut` were ended by a limit."""
    found = {f"completions/{name}_length": float(getattr(np, name)(tokens)) for name in ("mean", "min", "max")}
    found["completions/clipped_ratio"] = float(cut.mean())
    ended = tokens[~cut] if not cut.all() else np.zeros(1)  # TRL's value where none ended by itself
    for name in ("mean", "min", "max"):
        found[f"completions/{name}_terminated_length"] = float(getattr(np, name)(ended))
    return found


def _json(x: np.floating) -> float | None:
    return None if np.isnan(x) else float(x)
