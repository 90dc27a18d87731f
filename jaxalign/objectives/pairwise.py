"""Preference pairs, or triples with a gold response: any loss of `losses.LOSSES`, an NLL, or a weighted sum of them.

Letters: R rows, T time, S sequences of a row, E examples (pairs or triples), W their width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, lora, losses, models
from jaxalign.messages import did_you_mean
from jaxalign.metrics import Max, Mean, Metrics
from jaxalign.models.config import ModelConfig
from jaxalign.objectives import batches
from jaxalign.objectives.batches import Batch

SIDES = ("chosen", "rejected", "gold")
"""What the sequences of an example are, in their order; a pair has the first two."""


@dataclass(frozen=True)
class Pairwise(batches.Stateless):
    """Preference pairs: any loss of `losses.LOSSES`, the token NLL of the chosen side ("sft"), or a weighted sum.

    Batch leaves: tokens, positions [R, T] int32; mask [R, T] bool; lengths [R] int32; packed, segment_ids [R, T] and
    ends [R, S] int32; and where a loss has a reference ref_logps [R, T] float32 (per token, as `score` gives them).
    The sequences of an example are its chosen, its rejected and, of a triple, its gold response. An example with
    nothing masked is a filler and counts nowhere.

    Attributes:
      cfg: the model.
      terms: (name, weight) of each loss in the sum.
      options: keywords of the losses (beta, label_smoothing, ...), each loss gets those that it takes; cpo_alpha, the
        weight of the NLL beside simpo and cpo, and tpo_alpha, of the gold responses' beside tpo; and for losses
        against a reference
        - ld_alpha: weight, in every log-prob, of the tokens by which a response is longer than the other of its pair
          (Liu et al. 2024, https://arxiv.org/abs/2409.06411, LD-DPO);
        - use_weighting: a pair's loss is weighted by how likely the policy itself is to give its responses
          (Zhou et al. 2024, https://arxiv.org/abs/2406.11827, WPO, eq. 2, aligned by sampled tokens); an NLL is not.
    """

    cfg: ModelConfig
    terms: tuple[tuple[str, float], ...]
    options: tuple[tuple[str, Any], ...] = ()

    head: ClassVar[str] = "lm"

    @property
    def kind(self) -> str:
        """What an example is: triples where a loss has a gold response."""
        return "triples" if any(losses.LOSSES[name].kind == "triples" for name, _ in self._pair_terms) else "pairs"

    @property
    def width(self) -> int:
        """Sequences of an example."""
        return batches.WIDTHS[self.kind]

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with a reference."""
        return any(losses.LOSSES[name].needs_reference for name, _ in self._pair_terms)

    @property
    def couples(self) -> bool:
        """Whether a loss depends on all pairs of a batch."""
        return any(losses.LOSSES[name].couples for name, _ in self._pair_terms)

    @property
    def shares_prompt(self) -> bool:
        """Whether no prompt is scored, so that it may stand once for all responses."""
        return "rows" not in self._nll_weights

    def group(self, batch: Batch) -> int:
        """Rows that stay together when the batch is split."""
        return batches.rows_together(batch, self.width)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """Weights of the pairs, and of the tokens that an NLL is a mean over, in the batch: float32 scalars."""
        weights = batches.weights(batch, self.width)
        totals = {"pairs": weights.sum()}
        for name in self._nll_weights:
            totals[name] = (weights * self._nll_sums(name, self._nll_mask(name, batch), batch)).sum()
        return {name: batches.denominator(total) for name, total in totals.items()}

    def first_pass(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """`logps` [R, T]: the policy's log-probs, without gradient."""
        params = batches.weights_of(params, frozen)
        return jax.lax.stop_gradient(logprobs.score(self.cfg, params, batch))

    def couple(self, batch: Batch) -> dict[str, jax.Array]:
        """What ties the pairs of a whole batch together, from its leaves and `logps`: [R, S] float32 each.

        `coupled_loss`, at the chosen sequence: the pair's loss by those terms that look at the whole batch;
        `coupled_slope`: the derivative, by the sequence's log-prob, of these losses' weighted sum over the pair's
        weight. A part of the batch with these two has its part of the loss and of the gradient. Gao et al. 2021,
        https://arxiv.org/abs/2101.06983, section 3.
        """
        sequences = self._sequences({"logps": batch["logps"]}, batch)
        weights = sequences["weight"]

        def total(policy: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            moved = {**sequences, "policy_chosen": policy[0], "policy_rejected": policy[1]}
            pair_losses = jnp.where(weights > 0, self._losses(moved, of_batch=True), 0)
            return (weights * pair_losses).sum(), pair_losses

        policy = sequences["policy_chosen"], sequences["policy_rejected"]
        slopes, pair_losses = jax.grad(total, has_aux=True)(policy)
        slopes = [slope / batches.denominator(weights) for slope in slopes]

        def rows(*sides: jax.Array) -> jax.Array:
            others = (0, self.width - len(sides))
            return batches.by_row(jnp.pad(jnp.stack(sides, axis=1), ((0, 0), others)), batch)

        return {"coupled_loss": rows(pair_losses), "coupled_slope": rows(*slopes)}

    def examples(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """Per example, [E] float32: `loss` (without an NLL), rewards/* and logps/* as the loss has them, tokens, NLLs.

        `nll/chosen` (`chosen_tokens`), `nll/rejected` and, of triples, `nll/gold` are sums over a response, `nll/rows`
        over the whole chosen row. With a reference there are ref_logps/*, too, and where the batch has weights
        `weight`. `valid` (bool) is False for fillers. Where the policy's log-probs of the responses are known they come
        with the batch: `logps`.
        """
        want = self._statistics(("logps",))
        if "logps" in batch and want == ("logps",) and self.shares_prompt:
            return self._examples({"logps": batch["logps"]}, batch)
        return self._examples(self._score(batches.weights_of(params, frozen), batch, want), batch)

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        pair_losses = examples["loss"]
        weights = examples.get("weight", examples["valid"].astype(jnp.float32))
        if self.couples:
            sequences = {name: examples[name] for name in ("chosen_tokens", "rejected_tokens")} | {"weight": weights}
            for side in ("chosen", "rejected"):
                sequences |= {f"policy_{side}": examples[f"logps/{side}"], f"ref_{side}": examples[f"ref_logps/{side}"]}
            pair_losses = self._losses(sequences, of_batch=False) + self._losses(sequences, of_batch=True)
            pair_losses = jnp.where(weights > 0, pair_losses, 0)
        loss = (weights * pair_losses).sum() / batches.denominator(weights.sum())
        for name, factor in self._nll_weights.items():
            tokens = (weights * examples[f"{name}_tokens"]).sum()
            loss += factor * (weights * examples[f"nll/{name}"]).sum() / batches.denominator(tokens)
        return float(loss)

    def __call__(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it. `aux` and `key` are other objectives'."""
        del aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        stats = self._score(batches.weights_of(params, frozen), batch, self._statistics(batches.TOKEN_STATISTICS))
        pair, weights = self._examples(stats, batch), batches.weights(batch, self.width)
        loss = (weights * pair["loss"]).sum() / denominators["pairs"]
        metrics: Metrics = {}
        for name, factor in self._nll_weights.items():
            nll = pair[f"nll/{name}"]
            loss += factor * (weights * nll).sum() / denominators[name]
            metrics["nll_loss"] = Mean(nll.sum(), pair[f"{name}_tokens"].sum())
        if self.needs_reference:
            # 0 at the first step of a run that begins at its reference.
            difference_RT = jnp.abs(stats["logps"] - batch["ref_logps"])
            metrics["ref_logps_difference/max"] = Max(jnp.where(batch["mask"], difference_RT, 0).max())
        valid = pair["valid"]
        for name in pair:
            if name.startswith(("rewards/", "logps/", "log_odds")):
                metrics[name] = batches.mean(pair[name], valid)
        margins = pair["rewards/chosen"] - pair["rewards/rejected"]
        metrics["rewards/margins"] = batches.mean(margins, valid)
        metrics["rewards/accuracies"] = batches.mean((margins > 0).astype(jnp.float32), valid)
        scored_RT, place_RT = batches.scored(batch), batches.place(batch, self.width)
        chosen_RT, rejected_RT = scored_RT & (place_RT == 0), scored_RT & (place_RT == 1)
        metrics["logits/chosen"] = batches.mean(stats["mean_logit"], chosen_RT)
        metrics["logits/rejected"] = batches.mean(stats["mean_logit"], rejected_RT)
        metrics["entropy"] = batches.mean(stats["entropy"], scored_RT)
        metrics["mean_token_accuracy"] = batches.mean(stats["correct"], chosen_RT)
        return loss, jax.lax.stop_gradient(metrics)

    @property
    def _pair_terms(self) -> tuple[tuple[str, float], ...]:
        """The terms but sft; TRL logs the implicit rewards of DPO where it stands alone."""
        return tuple(term for term in self.terms if term[0] != "sft") or (("sigmoid", 0.0),)

    @property
    def _nll_weights(self) -> dict[str, float]:
        """What has weight of the token NLLs of the chosen responses, the gold ones and the whole chosen "rows"."""
        found = {"chosen": dict(self.terms).get("sft", 0.0), "gold": 0.0, "rows": 0.0}
        options = dict(self.options)
        for name, weight in self._pair_terms:
            loss = losses.LOSSES[name]
            found["rows"] += weight * loss.nll_of_rows
            if loss.nll is not None:
                found[loss.nll_side] += weight * options.get(loss.nll_option, loss.nll)
        return {name: weight for name, weight in found.items() if weight}

    def _nll_mask(self, name: str, batch: Batch) -> jax.Array:
        """The tokens [R, T] of an NLL of `_nll_weights`."""
        if name == "rows":
            rows_RT = batches.inside(batch) & batches.follows(batch)
            return rows_RT & (batches.place(batch, self.width) == 0)
        return batches.scored(batch) & (batches.place(batch, self.width) == SIDES.index(name))

    def _nll_sums(self, name: str, x_RT: jax.Array, batch: Batch) -> jax.Array:
        """[E] sums of x over the tokens of an NLL of `_nll_weights`, 0 for fillers; of bools their count."""
        found = batches.sums(x_RT, self._nll_mask(name, batch), batch, self.width).sum(axis=1)
        return jnp.where(batches.valid(batch, self.width), found, 0)

    def _statistics(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "sum_p2") if dict(self.options).get("use_weighting") else names

    def _score(self, params: models.Params, batch: Batch, want: tuple[str, ...]) -> dict[str, jax.Array]:
        """`logprobs.score` of the responses, and of the prompts of chosen rows where their NLL counts."""
        mask = batch["mask"]
        if "rows" in self._nll_weights:
            mask = mask | self._nll_mask("rows", batch)
        return logprobs.score(self.cfg, params, {**batch, "mask": mask}, want=want)

    def _sequences(self, stats: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """What the losses take of each example, [E] each: log-probs, tokens, `weight`; `likelihood` as a factor."""
        scored_RT = batches.scored(batch)
        tokens_EW = batches.sums(scored_RT, scored_RT, batch, self.width)
        ld_alpha = dict(self.options).get("ld_alpha", 1.0)

        def log_probs(logps_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
            if ld_alpha != 1:
                common = jnp.broadcast_to(tokens_EW[:, :2].min(axis=1, keepdims=True), tokens_EW.shape)
                common_RT = logprobs.per_token(batches.by_row(common, batch), batch.get("segment_ids"))
                is_longer_RT = batches.ordinal(scored_RT, batch) > common_RT
                logps_RT = jnp.where(is_longer_RT, ld_alpha * logps_RT, logps_RT)
            found = batches.sums(logps_RT, scored_RT, batch, self.width)
            return found[:, 0], found[:, 1]

        found = {"weight": batches.weights(batch, self.width)}
        found["chosen_tokens"], found["rejected_tokens"] = tokens_EW[:, 0], tokens_EW[:, 1]
        found["policy_chosen"], found["policy_rejected"] = log_probs(stats["logps"])
        if self.needs_reference:
            found["ref_chosen"], found["ref_rejected"] = log_probs(batch["ref_logps"])
        if "sum_p2" in stats:
            # How likely a token was beside how likely a token drawn from the policy is on average.
            aligned_RT = stats["logps"] - jnp.log(jnp.where(stats["sum_p2"] > 0, stats["sum_p2"], 1))
            average_EW = batches.sums(aligned_RT, scored_RT, batch, self.width) / jnp.maximum(tokens_EW, 1)
            found["likelihood"] = jax.lax.stop_gradient(jnp.exp(average_EW[:, 0] + average_EW[:, 1]))
        return found

    def _losses(self, sequences: Mapping[str, Any], *, of_batch: bool) -> jax.Array:
        """The weighted sum of the terms that look at one pair, or of those that look at the whole batch: [E]."""
        total = jnp.zeros_like(sequences["policy_chosen"])
        for name, weight in self._pair_terms:
            if losses.LOSSES[name].couples == of_batch:
                total += weight * self._call(name, sequences)[0]
        return total * sequences.get("likelihood", 1.0)

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
        }
        if self.couples:
            if "coupled_loss" not in batch:
                batch = {**batch, **self.couple({**batch, "logps": jax.lax.stop_gradient(stats["logps"])})}
            values["loss"] += batches.of_example("coupled_loss", batch, self.width)
            slopes = batches.by_example(batch["coupled_slope"], self.width)
            for at, side in enumerate(("chosen", "rejected")):
                logps = sequences[f"policy_{side}"]
                values["loss"] += slopes[:, at] * (logps - jax.lax.stop_gradient(logps))  # 0, with that derivative
        logged = self._call(self._pair_terms[0][0], sequences)[1]
        if self.needs_reference:
            values |= {"ref_logps/chosen": sequences["ref_chosen"], "ref_logps/rejected": sequences["ref_rejected"]}
            logged = {name: x for name, x in logged.items() if name.startswith("rewards/")}
        values |= logged
        of_rows = ("rows",) if "rows" in self._nll_weights else ()
        for name in (*SIDES[: self.width], *of_rows):
            values[f"nll/{name}"] = self._nll_sums(name, -stats["logps"], batch)
            values[f"{name}_tokens"] = self._nll_sums(name, self._nll_mask(name, batch), batch)
        if "weight" in batch:
            values["weight"] = sequences["weight"]
        valid = batches.valid(batch, self.width)
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
