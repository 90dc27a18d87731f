"""Objectives: a batch -> forward -> log-probs -> loss terms over their denominators.

An objective is called as `objective(params, frozen, batch, aux, key) -> (scalar, Metrics)` and has

  denominators(batch) -> {term: W}   what each term's sum is divided by, from masks alone, over the whole global batch
  examples(params, frozen, batch)    per-example values (loss, rewards, log-probs), for evaluation and diagnosis
  total(examples) -> float           the loss of many examples
  rows_per_example                   rows that stay together when a batch is split
  needs_reference                    `ref_logps` must be in the batch
  couples                            an example's loss depends on the whole batch, by way of
  first_pass(params, frozen, batch)  what must be known of each row, without gradient: leaves [R, ...]
  couple(batch) -> leaves [R, ...]   what follows from that over the whole global batch

The scalar of a micro-batch is sum over terms of weight * S_term / W_term with the W of the whole batch
(`batch["denominators"]`, which the step fills in), so that the sum over any split is the loss of the whole. The leaves
of `couple` come with a micro-batch in the same way; for a batch that is not split the objective makes them itself.

Letters: R rows, T time, P pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, losses, models
from jaxalign.messages import did_you_mean
from jaxalign.metrics import Max, Mean, Metrics
from jaxalign.models.config import ModelConfig

Batch = Mapping[str, Any]

TOKEN_STATISTICS = ("logps", "entropy", "mean_logit", "correct")


@dataclass(frozen=True)
class Pairwise:
    """Preference pairs: any loss of `losses.LOSSES`, the token NLL of the chosen side ("sft"), or a weighted sum.

    Batch leaves: tokens, positions [R, T] int32; mask [R, T] bool; lengths [R] int32; and where a loss has a reference
    ref_logps [R, T] float32 (per token, as `score` gives them). Rows 2i and 2i + 1 are the chosen and the rejected
    response of one pair. A pair with nothing masked on both sides is a filler and counts nowhere.

    Attributes:
      cfg: the model.
      terms: (name, weight) of each loss in the sum.
      options: keywords of the losses (beta, label_smoothing, ...), each loss gets those that it takes; cpo_alpha, the
        weight of the NLL beside simpo and cpo; and for losses against a reference
        - ld_alpha: weight, in every log-prob, of the tokens by which a response is longer than the other of its pair
          (Liu et al. 2024, https://arxiv.org/abs/2409.06411, LD-DPO);
        - use_weighting: a pair's loss is weighted by how likely the policy itself is to give its responses
          (Zhou et al. 2024, https://arxiv.org/abs/2406.11827, WPO, eq. 2, aligned by sampled tokens); an NLL is not.
    """

    cfg: ModelConfig
    terms: tuple[tuple[str, float], ...]
    options: tuple[tuple[str, Any], ...] = ()

    rows_per_example: ClassVar[int] = 2

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with a reference."""
        return any(losses.LOSSES[name].needs_reference for name, _ in self._pair_terms)

    @property
    def couples(self) -> bool:
        """Whether a loss depends on all pairs of a batch."""
        return any(losses.LOSSES[name].couples for name, _ in self._pair_terms)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """Pairs, and tokens that the NLL is a mean over, in the batch: float32 scalars, at least 1."""
        counts = {"pairs": _valid(batch).sum()}
        for name in self._nll_weights:
            counts[name] = self._nll_mask(name, batch)[:, 1:].sum()
        return {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in counts.items()}

    def first_pass(self, params: models.Params, frozen: models.Params | None, batch: Batch) -> dict[str, jax.Array]:
        """`logps` [R, T]: the policy's log-probs, without gradient."""
        del frozen
        return jax.lax.stop_gradient(logprobs.score(self.cfg, params, batch))

    def couple(self, batch: Batch) -> dict[str, jax.Array]:
        """What ties the pairs of a whole batch together, from its leaves and `logps`: [R] float32 each.

        `coupled_loss`, at the chosen row: the pair's loss by those terms that look at the whole batch; `coupled_slope`:
        the derivative of all these losses by the row's log-prob. A part of the batch with these two has its part of the
        loss and of the gradient. Gao et al. 2021, https://arxiv.org/abs/2101.06983, section 3.
        """
        sequences = self._sequences({"logps": batch["logps"]}, batch)

        def total(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
            moved = {**sequences, "policy_chosen": chosen, "policy_rejected": rejected}
            pair_losses = jnp.where(sequences["valid"], self._losses(moved, of_batch=True), 0)
            return pair_losses.sum(), pair_losses

        policy = sequences["policy_chosen"], sequences["policy_rejected"]
        slopes, pair_losses = jax.grad(total, (0, 1), has_aux=True)(*policy)
        nothing = jnp.zeros_like(pair_losses)
        return {"coupled_loss": _rows(pair_losses, nothing), "coupled_slope": _rows(*slopes)}

    def examples(self, params: models.Params, frozen: models.Params | None, batch: Batch) -> dict[str, jax.Array]:
        """Per pair, [P] float32: `loss` (without an NLL), rewards/* and logps/* as the loss has them, *_tokens, nll/*.

        `nll/chosen` and `nll/rejected` are sums over a response, `nll/rows` over the whole chosen row (`rows_tokens`).
        With a reference there are ref_logps/*, too. `valid` (bool) is False for fillers. Where the policy's log-probs
        are known they come with the batch: `logps`.
        """
        del frozen
        want = self._statistics(("logps",))
        is_known = "logps" in batch and want == ("logps",)
        return self._examples({"logps": batch["logps"]} if is_known else self._score(params, batch, want), batch)

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        pair_losses = examples["loss"]
        if self.couples:
            sequences = {name: examples[name] for name in ("chosen_tokens", "rejected_tokens", "valid")}
            for side in ("chosen", "rejected"):
                sequences |= {f"policy_{side}": examples[f"logps/{side}"], f"ref_{side}": examples[f"ref_logps/{side}"]}
            pair_losses = self._losses(sequences, of_batch=False) + self._losses(sequences, of_batch=True)
            pair_losses = jnp.where(examples["valid"], pair_losses, 0)
        loss = pair_losses.sum() / max(examples["valid"].sum(), 1)
        for name, weight in self._nll_weights.items():
            loss += weight * examples[f"nll/{name}"].sum() / max(examples[f"{name}_tokens"].sum(), 1)
        return float(loss)

    def __call__(
        self, params: models.Params, frozen: models.Params | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it. `frozen`, `aux` and `key` are other objectives'."""
        del frozen, aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        stats = self._score(params, batch, self._statistics(TOKEN_STATISTICS))
        pair = self._examples(stats, batch)
        loss = pair["loss"].sum() / denominators["pairs"]
        metrics: Metrics = {}
        for name, weight in self._nll_weights.items():
            nll = pair[f"nll/{name}"].sum()
            loss += weight * nll / denominators[name]
            metrics["nll_loss"] = Mean(nll, pair[f"{name}_tokens"].sum())
        if self.needs_reference:
            # 0 at the first step of a run that begins at its reference.
            difference_RT = jnp.abs(stats["logps"] - batch["ref_logps"])
            metrics["ref_logps_difference/max"] = Max(jnp.where(batch["mask"], difference_RT, 0).max())
        count = pair["valid"].sum().astype(jnp.float32)
        for name in pair:
            if name.startswith(("rewards/", "logps/", "log_odds")):
                metrics[name] = Mean(pair[name].sum(), count)
        margins = pair["rewards/chosen"] - pair["rewards/rejected"]
        metrics["rewards/margins"] = Mean(margins.sum(), count)
        metrics["rewards/accuracies"] = Mean((margins > 0).sum().astype(jnp.float32), count)
        chosen_PT, rejected_PT = _sides(batch["mask"])
        for name, value, mask in (
            ("logits/chosen", _sides(stats["mean_logit"])[0], chosen_PT),
            ("logits/rejected", _sides(stats["mean_logit"])[1], rejected_PT),
            ("entropy", stats["entropy"], batch["mask"]),
            ("mean_token_accuracy", _sides(stats["correct"])[0], chosen_PT),
        ):
            metrics[name] = Mean(jnp.where(mask, value, 0).sum(), mask[:, 1:].sum().astype(jnp.float32))
        return loss, jax.lax.stop_gradient(metrics)

    @property
    def _pair_terms(self) -> tuple[tuple[str, float], ...]:
        """The terms but sft; TRL logs the implicit rewards of DPO where it stands alone."""
        return tuple(term for term in self.terms if term[0] != "sft") or (("sigmoid", 0.0),)

    @property
    def _nll_weights(self) -> dict[str, float]:
        """What has weight of the token NLL of the chosen responses ("chosen") and of the whole chosen rows ("rows")."""
        chosen, rows = dict(self.terms).get("sft", 0.0), 0.0
        for name, weight in self._pair_terms:
            loss = losses.LOSSES[name]
            rows += weight * loss.nll_of_rows
            if loss.nll is not None:
                chosen += weight * dict(self.options).get("cpo_alpha", loss.nll)
        return {name: weight for name, weight in (("chosen", chosen), ("rows", rows)) if weight}

    def _nll_mask(self, name: str, batch: Batch) -> jax.Array:
        """The tokens [P, T] of an NLL of `_nll_weights`, one row a pair."""
        if name == "chosen":
            return _sides(batch["mask"])[0]
        places = jnp.arange(batch["mask"].shape[1])
        return (places < batch["lengths"][0::2, None]) & _valid(batch)[:, None]

    def _statistics(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "sum_p2") if dict(self.options).get("use_weighting") else names

    def _score(self, params: models.Params, batch: Batch, want: tuple[str, ...]) -> dict[str, jax.Array]:
        """`logprobs.score` of the responses, and of the prompts of chosen rows where their NLL counts."""
        mask = batch["mask"]
        if "rows" in self._nll_weights:
            rows_PT = self._nll_mask("rows", batch)
            mask = mask | jnp.stack([rows_PT, jnp.zeros_like(rows_PT)], axis=1).reshape(mask.shape)
        return logprobs.score(self.cfg, params, {**batch, "mask": mask}, want=want)

    def _sequences(self, stats: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """What the losses take of each pair, [P] each: log-probs, tokens, `valid`; under use_weighting `weights`."""
        mask_RT = batch["mask"]
        tokens_R1 = logprobs.per_sequence(mask_RT, mask_RT)
        chosen_tokens, rejected_tokens = _pairs(tokens_R1)
        ld_alpha = dict(self.options).get("ld_alpha", 1.0)
        longer_RT = jnp.cumsum(mask_RT, axis=1) > jnp.repeat(jnp.minimum(chosen_tokens, rejected_tokens), 2)[:, None]

        def log_probs(logps_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
            if ld_alpha != 1:
                logps_RT = jnp.where(longer_RT, ld_alpha * logps_RT, logps_RT)
            return _pairs(logprobs.per_sequence(logps_RT, mask_RT))

        found = {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens, "valid": _valid(batch)}
        found["policy_chosen"], found["policy_rejected"] = log_probs(stats["logps"])
        if self.needs_reference:
            found["ref_chosen"], found["ref_rejected"] = log_probs(batch["ref_logps"])
        if "sum_p2" in stats:
            # How likely a token was beside how likely a token drawn from the policy is on average.
            aligned_RT = stats["logps"] - jnp.log(jnp.where(stats["sum_p2"] > 0, stats["sum_p2"], 1))
            average_R1 = logprobs.per_sequence(aligned_RT, mask_RT) / jnp.maximum(tokens_R1, 1)
            found["weights"] = jax.lax.stop_gradient(jnp.exp(sum(_pairs(average_R1))))
        return found

    def _losses(self, sequences: Mapping[str, Any], *, of_batch: bool) -> jax.Array:
        """The weighted sum of the terms that look at one pair, or of those that look at the whole batch: [P]."""
        total = jnp.zeros_like(sequences["policy_chosen"])
        for name, weight in self._pair_terms:
            if losses.LOSSES[name].couples == of_batch:
                total += weight * self._call(name, sequences)[0]
        return total * sequences.get("weights", 1.0)

    def _call(self, name: str, sequences: Mapping[str, Any]) -> losses.PairLosses:
        loss = losses.LOSSES[name]
        arrays = {key: x for key, x in sequences.items() if key in loss.parameters}
        return loss.function(**arrays, **loss.keywords(dict(self.options)))

    def _examples(self, stats: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        sequences = self._sequences(stats, batch)
        values = {
            "loss": self._losses(sequences, of_batch=False),
            "logps/chosen": sequences["policy_chosen"],
            "logps/rejected": sequences["policy_rejected"],
            "chosen_tokens": sequences["chosen_tokens"],
            "rejected_tokens": sequences["rejected_tokens"],
        }
        if self.couples:
            if "coupled_loss" not in batch:
                batch = {**batch, **self.couple({**batch, "logps": jax.lax.stop_gradient(stats["logps"])})}
            values["loss"] += batch["coupled_loss"][0::2]
            for side, slope in zip(("chosen", "rejected"), _sides(batch["coupled_slope"]), strict=True):
                logps = sequences[f"policy_{side}"]
                values["loss"] += slope * (logps - jax.lax.stop_gradient(logps))  # 0, with that derivative
        logged = self._call(self._pair_terms[0][0], sequences)[1]
        if self.needs_reference:
            values |= {"ref_logps/chosen": sequences["ref_chosen"], "ref_logps/rejected": sequences["ref_rejected"]}
            logged = {name: x for name, x in logged.items() if name.startswith("rewards/")}
        values |= logged
        nll_chosen, nll_rejected = _pairs(logprobs.per_sequence(-stats["logps"], batch["mask"]))
        values |= {"nll/chosen": nll_chosen, "nll/rejected": nll_rejected}
        if "rows" in self._nll_weights:
            rows_PT = self._nll_mask("rows", batch)
            values["nll/rows"] = -jnp.where(rows_PT, _sides(stats["logps"])[0], 0).sum(axis=1)
            values["rows_tokens"] = rows_PT[:, 1:].sum(axis=1).astype(jnp.float32)
        valid = sequences["valid"]
        return {name: jnp.where(valid, x, 0.0) for name, x in values.items()} | {"valid": valid}


def pairwise(cfg: ModelConfig, loss: str | Mapping[str, float] = "sigmoid", **options: Any) -> Pairwise:
    """The objective of one loss by name, or of several by {name: weight}, with the losses' keywords (None: left out).

    Raises:
      ValueError: a name is unknown, no chosen loss takes one of the options, or one is out of its range.
    """
    terms = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    options = {name: value for name, value in options.items() if value is not None}
    known = {*losses.LOSSES, "sft"}
    if unknown := set(terms) - known:
        hint = did_you_mean(min(unknown), known)
        raise ValueError(f"no preference loss named {sorted(unknown)}; there are {sorted(known)}{hint}")
    names = [name for name in terms if name != "sft"]
    taken = {"beta"}.union(*(losses.LOSSES[name].options for name in names))
    if inert := set(options) - taken:
        hint = did_you_mean(min(inert), taken)
        raise ValueError(f"loss {sorted(terms)} takes {sorted(taken)}, not {sorted(inert)}{hint}")
    losses.check_terms(names, options)
    for name in names:
        losses.LOSSES[name].check(options)
    if not 0 <= options.get("ld_alpha", 1) <= 1:
        raise ValueError(f"ld_alpha is {options['ld_alpha']}, expected a weight in [0, 1] (1: as without)")
    return Pairwise(cfg, tuple(terms.items()), tuple(sorted(options.items())))


def _valid(batch: Batch) -> jax.Array:
    """[P] bool: the pairs that are no fillers."""
    chosen_PT, rejected_PT = _sides(batch["mask"])
    return chosen_PT.any(axis=1) | rejected_PT.any(axis=1)


def _sides(x_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chosen and rejected rows, [P, ...] each."""
    return x_R[0::2], x_R[1::2]


def _rows(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """[R] of chosen and rejected values, [P] each."""
    return jnp.stack([chosen, rejected], axis=1).reshape(-1)


def _pairs(x_RS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chosen and rejected values, [P] each, from per-sequence values whose neighbours are pairs."""
    x_P2 = x_RS.reshape(-1, 2)
    return x_P2[:, 0], x_P2[:, 1]
