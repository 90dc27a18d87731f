"""Objectives: a batch -> forward -> log-probs -> loss terms over their denominators; and the table of all losses.

An objective is called as `objective(params, frozen, batch, aux, key) -> (scalar, Metrics)` and has

  kind, width, head                  what an example is (`batches.WIDTHS`), its sequences, the model's head: lm or score
  denominators(batch) -> {term: W}   what each term's sum is divided by, without the model, over the whole global batch
  examples(params, frozen, batch)    per-example values (loss, rewards, log-probs), for evaluation and diagnosis
  total(examples) -> float           the loss of many examples
  group(batch)                       rows that stay together when a batch is split
  needs_reference                    `ref_logps` must be in the batch
  shares_prompt                      the numbers stay the same where a prompt stands once for all its responses
  couples                            an example's loss depends on the whole batch, by way of
  first_pass(params, frozen, batch)  what must be known of each row, without gradient: leaves [R, ...]
  couple(batch) -> leaves [R, ...]   what follows from that over the whole global batch
  init_aux() -> leaves               what the objective keeps from step to step in `TrainState.aux`, at first, and
  next_aux(aux, metrics) -> leaves   after a step with the metrics of the whole batch
  estimator, beta, kl_in_reward      of kind prompts: how a rollout's rewards become advantages (`advantages.combine`)

The scalar of a micro-batch is sum over terms of weight * S_term / W_term with the W of the whole batch
(`batch["denominators"]`, which the step fills in), so that the sum over any split is the loss of the whole. The leaves
of `couple` come with a micro-batch in the same way; for a batch that is not split the objective makes them itself.

The leaf `weight` is what an example counts: every sum over examples is weighted by it and every denominator is a sum of
weights, so that 0 is as if the example were not there and 2 as if it were there twice. What is logged is unweighted.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxalign import losses
from jaxalign.messages import did_you_mean
from jaxalign.models.config import ModelConfig
from jaxalign.objectives.batches import WIDTHS, Batch
from jaxalign.objectives.pairwise import Pairwise, pairwise
from jaxalign.objectives.policy import Policy, make_policy
from jaxalign.objectives.reward import Attributes, Reward, make_reward, score
from jaxalign.objectives.sft import Sft
from jaxalign.objectives.unpaired import Unpaired, make_unpaired, unpaired_kind

__all__ = [
    "LOSSES", "WIDTHS", "Attributes", "Batch", "Loss", "Pairwise", "Policy", "Reward", "Sft", "Unpaired",
    "check_names", "kind_of", "make", "needs_reference", "options_of", "pairwise", "score", "takers",
]  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """A loss as `loss.name` selects it, of whatever family.

    Attributes:
      kind: what an example is, see `batches.WIDTHS`.
      summary: what it is, in a line.
      build: (cfg, name, **options) -> the objective of this loss alone.
      options: keywords that a config may set, with their defaults.
      needs_reference: it compares with log-probs under a reference; those of prompts do where their beta is not 0.
      head: "lm", or "score" where the model gives rewards.
      sampling: keywords of `build` that say how completions were sampled, which no loss.* key does.
    """

    kind: str
    summary: str
    build: Callable[..., Any]
    options: Mapping[str, Any]
    needs_reference: bool = False
    head: str = "lm"
    sampling: tuple[str, ...] = ()


def _summary(function: Callable[..., Any]) -> str:
    """The first line of a docstring, without its stop."""
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of a loss, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


SAMPLING = ("temperature", "max_completion_length")

LOSSES: dict[str, Loss] = {
    **{
        name: Loss(loss.kind, _summary(loss.function), pairwise, loss.options, loss.needs_reference)
        for name, loss in losses.LOSSES.items()
    },
    **{name: Loss("chats", _summary(function), Sft, {}) for name, function in losses.TOKEN_LOSSES.items()},
    **{
        name: Loss(unpaired_kind(name), _summary(function), make_unpaired, _options(function), needs_reference=True)
        for name, function in losses.UNPAIRED.items()
    },
    **{
        name: Loss("prompts", loss.summary, make_policy, losses.policy_options(name), sampling=SAMPLING)
        for name, loss in losses.POLICY.items()
    },
    "reward": Loss("pairs", _summary(losses.bradley_terry), make_reward, _options(losses.bradley_terry), head="score"),
    "attributes": Loss("scored", _summary(losses.attributes), make_reward, {"reward_weights": None}, head="score"),
}
"""Every loss by name. Those of pairs and triples may be summed; in a sum, `sft` is the NLL of the chosen responses."""


def make(cfg: ModelConfig, loss: str | Mapping[str, float], **options: Any) -> Any:
    """The objective of a loss by name, or of several by {name: weight}, with its options (None: left out).

    Raises:
      ValueError: a name is unknown, losses can't be summed, no loss takes one of the options, or one is out of range.
    """
    terms = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    check_names(terms)
    options = {name: value for name, value in options.items() if value is not None}
    taken = {option for name in terms for option in (*LOSSES[name].options, *LOSSES[name].sampling)}
    if inert := set(options) - taken:
        hint = did_you_mean(min(inert), taken)
        raise ValueError(f"loss {sorted(terms)} takes {sorted(taken)}, not {sorted(inert)}{hint}")
    if not losses.LOSSES.keys().isdisjoint(terms):
        return pairwise(cfg, terms, **options)
    (name,) = terms
    return LOSSES[name].build(cfg, name, **options)


def check_names(terms: Iterable[str]) -> None:
    """Raises ValueError where a name is unknown, or where several are named that can't be summed."""
    terms = list(terms)
    if unknown := [name for name in terms if name not in LOSSES]:
        hint = did_you_mean(unknown[0], LOSSES)
        raise ValueError(f"no loss named {', '.join(map(repr, unknown))}; there are {', '.join(LOSSES)}{hint}")
    if len(terms) > 1 and (alone := [name for name in terms if name not in (*losses.LOSSES, "sft")]):
        summed = f"{', '.join(losses.LOSSES)}, and sft beside them"
        raise ValueError(f"{alone[0]!r} is no term of a sum; losses that can be summed: {summed}")


def kind_of(loss: str | Iterable[str]) -> str:
    """What an example of a loss, or of the sum of several, is."""
    names = [loss] if isinstance(loss, str) else list(loss)
    kinds = {LOSSES[name].kind for name in names}
    return kinds.pop() if len(kinds) == 1 else "triples" if "triples" in kinds else "pairs"


def options_of(name: str) -> Mapping[str, Any]:
    """The options that a loss takes, with their defaults."""
    return LOSSES[name].options


def needs_reference(terms: Iterable[str], beta: float | None = None) -> bool:
    """Whether one of the losses compares with a reference, given `loss.beta` (None: the loss's own)."""
    return any(
        bool(loss.options["beta"] if beta is None else beta) if loss.kind == "prompts" else loss.needs_reference
        for loss in (LOSSES[name] for name in terms)
    )


def takers(option: str) -> list[str]:
    """The losses that take an option."""
    return [name for name, loss in LOSSES.items() if option in loss.options]
