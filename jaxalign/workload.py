"""The programs of a run with what they are called with, from its config alone: abstract arrays, at the longest rows."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import decoding, lora, programs, sampling, sharding
from jaxalign.data import packing
from jaxalign.data.batching import default_buckets
from jaxalign.data.formats import LABELLED

PACKED_EXAMPLES = 8  # that a packed row can hold; where data are known, about twice what it holds on average


class Job(NamedTuple):
    """A program to compile: what it is called with, and what else of the run is alive meanwhile (abstract arrays)."""

    name: str
    rows: tuple[int, int]
    lower: Callable[[], Any]
    arguments: Any
    besides: Any


def jobs(run: programs.Programs) -> Iterator[Job]:
    """The programs of a run with all that they are called with, each at its longest rows."""
    config, state, frozen = run.config, run.state, run.frozen
    whole, one, scored = config.batch_size, run.eval_examples, run.objective.needs_reference
    sampled = run.objective.kind == "prompts"

    def job(name: str, function: Any, before: tuple[Any, ...], rows: dict[str, Any], besides: Any) -> Job:
        arguments = (*before, rows)
        return Job(name, rows["tokens"].shape, lambda: function.lower(*arguments), arguments, besides)

    shares = frozen is not None and config.reference.path is None  # then the reference is the frozen weights
    fixed = run.reference if run.live_reference and run.sync is None and not shares else None
    if run.sync is not None:
        others = {name: x for name, x in state.aux.items() if name != "reference"}
        yield job("score", run.score, (state.aux["reference"],), batch(run, whole), state._replace(aux=others))
    elif run.cached_reference and scored:  # before the first step, when there is no optimizer yet
        part = batch(run, whole // config.gradient_accumulation_steps)
        yield job("score", run.score_once, (run.reference,), part, (state.params, None if shares else frozen))
    elif sampled:
        part = batch(run, whole // config.gradient_accumulation_steps)
        if scored:
            yield job("score", run.score_once, (run.reference,), part, (state, None if shares else frozen))
        if "old_logps" in programs.scored(config, run.objective):
            besides = (state._replace(params=None), fixed)
            yield job("score policy", run.score_policy, (weights_of(run),), part, besides)
    elif run.live_reference:
        yield job("score", run.score, (run.reference,), batch(run, whole), (state, None if shares else frozen))
    yield job("train step", run.train_step, (state, frozen), batch(run, whole, scored=scored or sampled), fixed)
    without_weights = (state._replace(params=None), fixed)
    is_evaluated = config.data.eval.path or config.data.eval.split or config.data.eval.fraction
    if sampled:
        r = config.rollout
        completions = config.batch_size * r.steps_per_generation
        yield from samplers(
            run,
            without_weights,
            n_prompts=completions // r.num_generations,
            n=r.num_generations,
            slots=min(r.slots or completions, completions),
            max_prompt_tokens=config.max_length - 1 if r.function else programs.longest_prompt(config),
            max_new_tokens=r.max_completion_length,
        )
    elif is_evaluated:
        yield job("evaluate", run.examples, (state.params, frozen), batch(run, one, scored=scored), without_weights)
    if prompts := config.samples.prompts:
        yield from samplers(
            run,
            without_weights,
            name="samples: ",
            n_prompts=prompts if isinstance(prompts, int) else len(prompts),
            max_prompt_tokens=config.data.max_prompt_length or config.max_length - 1,
            max_new_tokens=config.samples.max_new_tokens,
        )


def batch(run: programs.Programs, examples: int, *, scored: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of so many examples at their longest; packed ones fill as many rows as they have tokens for.

    `scored`: with what is known of its tokens before a step.
    """
    config, objective = run.config, run.objective
    rows, slots = objective.width * examples, 1
    length = (config.data.buckets or default_buckets(config.max_length))[-1]
    leaves: dict[str, tuple[Any, tuple[int, ...]]] = {}
    if config.data.packing != "off":
        multiple = sharding.axis_size(sharding.ROWS, run.mesh) * config.gradient_accumulation_steps
        tokens, length = rows * length, config.data.packed_length or objective.width * length
        rows, slots = packing.round_up(-(-tokens // length), multiple), PACKED_EXAMPLES * objective.width
        leaves["segment_ids"] = (np.int32, (length,))
        if config.data.packing == "shared":
            leaves["prefix_ids"] = (np.int32, (length,))
    leaves |= dict.fromkeys(("tokens", "positions"), (np.int32, (length,))) | {"mask": (np.bool_, (length,))}
    leaves |= {"lengths": (np.int32, ()), "ends": (np.int32, (slots,))}
    of_tokens = ["ref_logps"] * scored
    if scored and objective.kind == "prompts":
        of_tokens = [*programs.scored(config, objective), *["sampling_logps"] * programs.has_sampling_logps(config)]
        whole = objective.estimator == "reinforce_pp" and objective.kl_in_reward
        leaves |= {"advantages": (np.float32, (length if whole else slots,)), "truncated": (np.float32, (slots,))}
    leaves |= dict.fromkeys(of_tokens, (np.float32, (length,)))
    if objective.kind in LABELLED:
        leaves["label"] = (np.float32, (slots,))
    if objective.kind == "scored":
        leaves["scores"] = (np.float32, (slots, run.cfg.num_labels))
    if config.data.weight is not None:
        leaves["weight"] = (np.float32, (slots,))
    place = sharding.row_sharding(run.mesh)
    return {name: jax.ShapeDtypeStruct((rows, *rest), dtype, sharding=place) for name, (dtype, rest) in leaves.items()}


def weights_of(run: programs.Programs) -> Any:
    """All weights of the policy: the trained ones, or the frozen ones with adapters."""
    weights = jax.eval_shape(lora.attach, run.frozen, run.state.params)
    placed = lora.flat(run.state.params) | ({} if run.frozen is None else lora.flat(run.frozen.base))
    return lora.nest({path: placed.get(path, leaf) for path, leaf in lora.flat(weights).items()})


def samplers(run: programs.Programs, besides: tuple[Any, ...], *, name: str = "", **asked: Any) -> Iterator[Job]:
    """The programs that sample, as long as the data allow; `asked`: as of `sampling.programs`."""
    weights = weights_of(run)
    found = sampling.programs(run.cfg, weights, **asked)
    view, slots, *_ = found["decode"].arguments
    copied = jax.tree.leaves(weights)
    if not decoding.is_view(view):  # as they are, so that what is in the right dtype is the same array
        copied = [old for old, new in zip(copied, jax.tree.leaves(view), strict=True) if old.dtype != new.dtype]
    for part, program in found.items():
        alive = (*besides, copied, slots if part == "prefill" else None)
        yield Job(f"{name}{part}", program.rows, program.lower, program.arguments, alive)
