"""Objectives: a batch -> forward -> log-probs -> loss terms over their denominators.

An objective is called as `objective(params, frozen, batch, aux, key) -> (scalar, Metrics)` and has

  denominators(batch) -> {term: W}   what each term's sum is divided by, from masks alone, over the whole global batch
  examples(params, frozen, batch)    per-example values (loss, rewards, log-probs), for evaluation and diagnosis
  total(examples) -> float           the loss of many examples
  rows_per_example                   rows that stay together when a batch is split

The scalar of a micro-batch is sum over terms of weight * S_term / W_term with the W of the whole batch
(`batch["denominators"]`, which the step fills in), so that the sum over any split is the loss of the whole.

Letters: R rows, T time, P pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, losses, models
from jaxalign.metrics import Max, Mean, Metrics
from jaxalign.models.config import ModelConfig

Batch = Mapping[str, Any]

TOKEN_STATISTICS = ("logps", "entropy", "mean_logit", "correct")


@dataclass(frozen=True)
class Pairwise:
    """Preference pairs: any loss of `losses.LOSSES`, the token NLL of the chosen side ("sft"), or a weighted sum.

    Batch leaves: tokens, positions [R, T] int32; mask [R, T] bool; ref_logps [R, T] float32 (per token, as `score`
    gives them). Rows 2i and 2i + 1 are the chosen and the rejected response of one pair. A pair with nothing masked
    on both sides is a filler and counts nowhere.

    Attributes:
      cfg: the model.
      terms: (name, weight) of each loss in the sum.
      options: keywords of the losses (beta, label_smoothing, ...); each loss gets those that it takes.
    """

    cfg: ModelConfig
    terms: tuple[tuple[str, float], ...]
    options: tuple[tuple[str, Any], ...] = ()

    rows_per_example: ClassVar[int] = 2

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """Pairs, and tokens of chosen responses, in the batch: float32 scalars, at least 1."""
        chosen_PT, rejected_PT = _sides(batch["mask"])
        pairs = (chosen_PT.any(axis=1) | rejected_PT.any(axis=1)).sum()
        return {
            "pairs": jnp.maximum(pairs, 1).astype(jnp.float32),
            "chosen_tokens": jnp.maximum(chosen_PT[:, 1:].sum(), 1).astype(jnp.float32),
        }

    def examples(self, params: models.Params, frozen: models.Params | None, batch: Batch) -> dict[str, jax.Array]:
        """Per pair, [P] float32: `loss` (of the pair terms), rewards/*, logps/*, ref_logps/*, *_tokens.

        `valid` (bool) is False for fillers. Where the policy's log-probs are known they come with the batch: `logps`.
        """
        del frozen
        logps_RT = batch["logps"] if "logps" in batch else logprobs.score(self.cfg, params, batch)["logps"]
        return self._examples(logps_RT, batch)

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        loss = examples["loss"].sum() / max(examples["valid"].sum(), 1)
        nll = -examples["logps/chosen"].sum() / max(examples["chosen_tokens"].sum(), 1)
        return float(loss + dict(self.terms).get("sft", 0.0) * nll)

    def __call__(
        self, params: models.Params, frozen: models.Params | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it. `frozen`, `aux` and `key` are other objectives'."""
        del frozen, aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        stats = logprobs.score(self.cfg, params, batch, want=TOKEN_STATISTICS)
        pair = self._examples(stats["logps"], batch)
        loss = pair["loss"].sum() / denominators["pairs"]
        chosen_mask_PT, rejected_mask_PT = _sides(batch["mask"])
        if weight := dict(self.terms).get("sft"):
            nll = -jnp.where(chosen_mask_PT, _sides(stats["logps"])[0], 0).sum()
            loss += weight * nll / denominators["chosen_tokens"]

        count = pair["valid"].sum().astype(jnp.float32)
        # 0 at the first step of a run that begins at its reference.
        difference_RT = jnp.abs(stats["logps"] - batch["ref_logps"])
        metrics: Metrics = {"ref_logps_difference/max": Max(jnp.where(batch["mask"], difference_RT, 0).max())}
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            metrics[name] = Mean(pair[name].sum(), count)
        margins = pair["rewards/chosen"] - pair["rewards/rejected"]
        metrics["rewards/margins"] = Mean(margins.sum(), count)
        metrics["rewards/accuracies"] = Mean((margins > 0).sum().astype(jnp.float32), count)
        for name, side, mask_PT in (
            ("logits/chosen", _sides(stats["mean_logit"])[0], chosen_mask_PT),
            ("logits/rejected", _sides(stats["mean_logit"])[1], rejected_mask_PT),
            ("entropy", stats["entropy"], batch["mask"]),
            ("mean_token_accuracy", _sides(stats["correct"])[0], chosen_mask_PT),
        ):
            metrics[name] = Mean(side.sum(), mask_PT[:, 1:].sum().astype(jnp.float32))
        return loss, jax.lax.stop_gradient(metrics)

    def _examples(self, logps_RT: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        policy_chosen, policy_rejected = _pairs(logprobs.per_sequence(logps_RT, batch["mask"]))
        ref_chosen, ref_rejected = _pairs(logprobs.per_sequence(batch["ref_logps"], batch["mask"]))
        chosen_tokens, rejected_tokens = _pairs(logprobs.per_sequence(batch["mask"], batch["mask"]))
        valid = (chosen_tokens > 0) | (rejected_tokens > 0)
        total = jnp.zeros_like(policy_chosen)
        rewards: dict[str, jax.Array] = {}
        for name, weight in self.terms:
            if name == "sft":
                continue
            preference = losses.LOSSES[name]
            options = {key: x for key, x in self.options if key in preference.options}
            if preference.takes_tokens:
                options |= {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens}
            pair_losses, rewards = preference.function(
                policy_chosen, policy_rejected, ref_chosen, ref_rejected, **options
            )
            total += weight * pair_losses
        if not rewards:  # "sft" alone: TRL still logs the implicit rewards
            beta = dict(self.options).get("beta", losses.LOSSES["sigmoid"].options["beta"])
            _, rewards = losses.dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
        values = {
            "loss": total,
            **rewards,
            "logps/chosen": policy_chosen,
            "logps/rejected": policy_rejected,
            "ref_logps/chosen": ref_chosen,
            "ref_logps/rejected": ref_rejected,
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
        }
        return {name: jnp.where(valid, x, 0.0) for name, x in values.items()} | {"valid": valid}


def pairwise(cfg: ModelConfig, loss: str | Mapping[str, float] = "sigmoid", **options: Any) -> Pairwise:
    """The objective of one loss by name, or of several by {name: weight}, with the losses' keywords.

    Raises:
      ValueError: a name is unknown, or no chosen loss takes one of the options.
    """
    terms = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    known = {*losses.LOSSES, "sft"}
    if unknown := set(terms) - known:
        raise ValueError(f"no preference loss named {sorted(unknown)}; there are {sorted(known)}")
    taken = {"beta"}.union(*(losses.LOSSES[name].options for name in terms if name != "sft"))
    if inert := set(options) - taken:
        raise ValueError(f"loss {sorted(terms)} takes {sorted(taken)}, not {sorted(inert)}")
    return Pairwise(cfg, tuple(terms.items()), tuple(sorted(options.items())))


def _sides(x_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chosen and rejected rows, [P, T] each."""
    return x_RT[0::2], x_RT[1::2]


def _pairs(x_RS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chosen and rejected values, [P] each, from per-sequence values whose neighbours are pairs."""
    x_P2 = x_RS.reshape(-1, 2)
    return x_P2[:, 0], x_P2[:, 1]
