"""The policy as an actor: it samples completions of prompts, in one turn or by a user's function in several, and has
them rewarded. Training and evaluation ask it alike.

Letters: C completions, P prompts, F rewards, N tokens of a completion, B requests.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import decoding, hf, models, sampling
from jaxalign.data.sources import Prepared
from jaxalign.detokenize import Stops, stops
from jaxalign.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Completions of a list of prompts, one after another.

    tokens: int32 arrays [N]. masks: bool arrays [N], True where the policy wrote the token. logps: float32 [N], by the
    sampler's programs at the temperature, unfiltered; of a user's function those that it gave, NaN where they are not
    known, or None if it gave none. ended [C] bool: not cut off by a limit. texts: without special tokens.
    """

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    logps: list[np.ndarray] | None
    ended: np.ndarray
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class Actor:
    """Samples completions and rewards them, as training and evaluation do. On several processes all call it alike.

    Attributes:
      cfg, tokenizer, rewards: as their names say (`rewards.Rewards`).
      limits: the keywords of `sampling.make_limits` that hold for all completions.
      stop: texts that end a completion.
      max_length: tokens of prompt and completion.
      max_completion_length: tokens of a completion.
      min_completion_length: the limit of each completion is drawn from this to that; None: it is that.
      slots: completions decoded at once.
      max_prompt_tokens: of any prompt, so that all calls share their programs; None: the longest of each call.
      function: (generate, rows) -> (token ids, mask) of each row, or (token ids, mask, log-probs); None: one completion
        of each prompt. Every process calls it with the same rows, and it is to give all of them the same.
      ends: token ids that end a completion, beside those of `cfg` and the tokenizer.
      on_progress: called with what was finished, for a watchdog.
    """

    cfg: ModelConfig
    tokenizer: Any
    rewards: Any
    limits: Mapping[str, Any]
    stop: tuple[str, ...]
    max_length: int
    max_completion_length: int
    slots: int
    min_completion_length: int | None = None
    max_prompt_tokens: int | None = None
    function: Callable[..., Any] | None = None
    ends: tuple[int, ...] = ()
    on_progress: Callable[[str], object] = lambda what: None

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a completion."""
        return tuple(dict.fromkeys((*hf.stop_ids(self.cfg, self.tokenizer), *self.ends, *self._stops[1])))

    @functools.cached_property
    def _stops(self) -> Any:
        return stops(self.tokenizer, self.stop, min_new_tokens=self.limits["min_new"])

    def sample(
        self,
        params: models.Params,
        prepared: Prepared,
        places: Sequence[int] | np.ndarray,
        seed: int,
        *,
        n: int = 1,
        temperature: float | None = None,
    ) -> Sampled:
        """n completions of each of the prompts at `places`.

        Args:
          params: the whole weights.
          seed: what is drawn depends on it and on the completion's place in the list.
          temperature: another one than that of `limits`.
        """
        prompts = [prepared.prompt(int(i)) for i in places]
        generate = Generate(self, params, seed, temperature)
        if self.function is None:
            return generate.sample(prompts, n)
        rows = [
            {**prepared.text(int(i)), "prompt_ids": ids.tolist()}
            for i, ids in zip(places, prompts, strict=True)
            for _ in range(n)
        ]
        return self._checked(rows, self.function(generate, rows))

    def _checked(self, rows: list[dict[str, Any]], found: Any) -> Sampled:
        """What a user's function has returned for `rows`."""
        found, tokens, masks, logps = list(found), [], [], []
        if len(found) != len(rows):
            raise ValueError(f"rollout.function returned {len(found)} completions for {len(rows)} rows")
        for row, (ids, mask, *given) in zip(rows, found, strict=True):
            tokens.append(np.asarray(ids, np.int32))
            masks.append(np.asarray(mask, bool))
            logps.append(np.asarray(given[0] if given else np.full(len(ids), np.nan), np.float32))
            if tokens[-1].ndim != 1 or tokens[-1].shape != masks[-1].shape or not masks[-1].any():
                raise ValueError(
                    f"rollout.function returned ids of shape {tokens[-1].shape} with a mask of shape "
                    f"{masks[-1].shape}, expected as many, some of them True (sampled)"
                )
            if logps[-1].shape != tokens[-1].shape:
                raise ValueError(
                    f"rollout.function returned ids of shape {tokens[-1].shape} with log-probs of shape "
                    f"{logps[-1].shape}, expected as many (NaN where one is not known)"
                )
            if len(ids) + len(row["prompt_ids"]) > self.max_length:
                raise ValueError(
                    f"rollout.function returned {len(ids)} tokens after a prompt of {len(row['prompt_ids'])}, more "
                    f"than max_length = {self.max_length} holds: raise it, or end such rows earlier"
                )
        known = any(np.isfinite(x[mask]).any() for x, mask in zip(logps, masks, strict=True))
        _check_same("what it returned", [*tokens, *masks, known])
        ended = np.array([self._has_ended(ids, mask) for ids, mask in zip(tokens, masks, strict=True)])
        whole = Stops(self.tokenizer, ())  # a turn's stop string is no end of the text
        texts = [whole.text(ids.tolist(), ended=True) for ids in tokens]
        return Sampled(tokens, masks, logps if known else None, ended, texts)

    def _has_ended(self, ids: np.ndarray, mask: np.ndarray) -> bool:
        """Whether the last turn of a completion ends by itself."""
        return ids[-1] in self.stop_ids or bool(mask[-1] and self._stops[0].completed_by_last(ids.tolist()))

    def reward(
        self, prepared: Prepared, places: Sequence[int] | np.ndarray, sampled: Sampled
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards [C, F], NaN where there is none, and which of them failed [C, F], of the same completions everywhere.

        `places` [P]: the prompts, each of as many neighbouring completions. Each process rewards those of its own
        prompts; what the others found is exchanged.
        """
        n = len(sampled.tokens) // len(places)
        owner = np.repeat(np.arange(len(places)) * jax.process_count() // len(places), n)
        shape = len(sampled.tokens), len(self.rewards.names)
        values, failed = np.full(shape, np.nan, np.float32), np.zeros(shape, bool)
        own = np.flatnonzero(owner == jax.process_index())
        asked = [prepared.asked(int(i)) for i in places]
        completions = [
            text if isinstance(asked[c // n], str) else [{"role": "assistant", "content": text}]
            for c, text in enumerate(sampled.texts)
        ]
        scores = self.rewards(
            [asked[c // n] for c in own],
            [completions[c] for c in own],
            prepared.columns(np.asarray(places)[own // n]),
            completion_ids=[sampled.tokens[c].tolist() for c in own],
        )
        values[own], failed[own] = scores.values, scores.errors
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            every = np.arange(len(owner))
            values, failed = (np.asarray(multihost_utils.process_allgather(x))[owner, every] for x in (values, failed))
        return values, failed


@dataclasses.dataclass
class Generate:
    """What a user's rollout function samples with: `generate(prompts) -> completions`, token ids in and out.

    Attributes:
      actor: its `tokenizer` turns ids into text and back.
      params, seed, temperature: as of `Actor.sample`.
      calls: how often it was called: every call draws anew.
    """

    actor: Actor
    params: models.Params = dataclasses.field(repr=False)
    seed: int
    temperature: float | None
    calls: int = 0

    def __call__(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | None = None) -> list[list[int]]:
        """A completion of each prompt, its stop id included, of at most `max_new_tokens` tokens."""
        return [ids.tolist() for ids in self.sample(prompts, 1, max_new_tokens).tokens]

    @property
    def tokenizer(self) -> Any:
        """The run's tokenizer."""
        return self.actor.tokenizer

    @functools.cached_property
    def _view(self) -> models.Params:
        """The weights as decoding reads them, made once for all calls."""
        return self.params if decoding.is_view(self.params) else decoding.view(self.actor.cfg, self.params)

    def sample(self, prompts: Sequence[Any], n: int, max_new_tokens: int | None = None) -> Sampled:
        """n completions of each prompt, with their log-probs."""
        actor, count = self.actor, len(prompts) * n
        if actor.function is not None:
            _check_same("the prompts that it asks for", prompts)
        most = min(max_new_tokens or actor.max_completion_length, actor.max_completion_length)
        room = [min(most, actor.max_length - len(ids)) for ids in prompts]
        if min(room, default=1) < 1:
            raise ValueError(f"a prompt of {max(map(len, prompts))} tokens leaves no room within {actor.max_length}")
        room_B = np.repeat(np.array(room, int), n)
        if actor.min_completion_length is not None:
            random = np.random.default_rng(seed_of(self.seed, self.calls, 1))
            drawn_B = random.integers(min(actor.min_completion_length, most), most, count, endpoint=True)
            room_B = np.minimum(room_B, drawn_B)
        # Fewer requests than slots would be another program; these ask for nothing.
        fillers = max(-(-actor.slots // n) - len(prompts), 0)
        prompts, room_B = [*prompts, *[[0]] * fillers], np.concatenate([room_B, np.zeros(fillers * n, int)])
        rows = len(room_B)
        limits = dict(actor.limits) | ({} if self.temperature is None else {"temperature": self.temperature})
        find = actor._stops[0]
        samples = sampling.sample(
            actor.cfg,
            self._view,
            prompts,
            sampling.request_keys(seed_of(self.seed, self.calls), np.arange(rows)),
            sampling.make_limits(rows, **limits, max_new=room_B, stop_ids=actor.stop_ids),
            max_new_tokens=actor.max_completion_length,
            n=n,
            slots=actor.slots,
            max_prompt_tokens=actor.max_prompt_tokens,
            stop=find if find.strings else None,
            on_progress=lambda done, tokens: actor.on_progress(f"{done} of {count} completions, {tokens} tokens"),
        )
        self.calls += 1
        tokens = [samples.tokens[b, samples.mask[b]] for b in range(count)]
        logps = [samples.scaled_logps[b, samples.mask[b]] for b in range(count)]
        ended = np.array([ids[-1] in actor.stop_ids or find(ids.tolist()) is not None for ids in tokens])
        texts = [find.text(ids.tolist(), ended=bool(end)) for ids, end in zip(tokens, ended, strict=True)]
        return Sampled(tokens, [np.ones(len(ids), bool) for ids in tokens], logps, ended, texts)


def _check_same(what: str, arrays: Sequence[Any]) -> None:
    """That a user's rollout function does the same in every process, whose batches are parts of one."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = zlib.crc32(repr([np.asarray(x).tolist() for x in arrays]).encode())
    if len(set(np.asarray(multihost_utils.process_allgather(np.uint32(digest))).tolist())) > 1:
        raise ValueError(
            f"rollout.function: {what} differs from process to process. Each calls it with the same rows: chance, time "
            "or a tool in it must give all the same, e.g. seeded by the row"
        )


def seed_of(*numbers: int) -> int:
    """A seed from several, each of which changes all that is drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)
