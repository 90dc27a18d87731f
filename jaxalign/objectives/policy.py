"""The objective of sampled completions with advantages: any loss of `losses.policy`, from GRPO to REINFORCE++.

Letters: R rows, T time, S sequences that a row can hold, E examples: completions.
"""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import logprobs, lora, models
from jaxalign.losses import policy as losses
from jaxalign.metrics import Max, Mean, Metrics, Min
from jaxalign.models.config import ModelConfig
from jaxalign.objectives import batches
from jaxalign.objectives.batches import Batch
from jaxalign.segments import Sequences, per_token


@dataclass(frozen=True)
class Policy(batches.Stateless):
    """Make sampled completions likelier by their advantage: any loss of `losses.policy.POLICY`.

    An example is one completion with its prompt; `mask` is True on the tokens that were sampled. All denominators are
    those of the whole global batch of an update. (TRL divides `dapo` and its kind by the tokens of a whole generation
    batch over the number of updates that it is split into, and `bnpo` by those of a micro-batch; here both divide by
    the tokens of the update, so that they are one loss.)

    Batch leaves: those of `batches`; `advantages` [R, S] float32, or [R, T] where they differ from token to token;
    `ref_logps` [R, T] where there is a beta; and where they are known `old_logps` [R, T], under the policy that sampled
    (else it is this one), and `sampling_logps` [R, T], as the sampler had them, for a metric and the importance
    correction; `truncated` [R, S] (1: the completion has no end); where examples are weighted `weight` [R, S]. All
    log-probs are those at `temperature`. `couple` gives `high_entropy` [R, T] and `high_entropy_tokens` [R].

    Attributes:
      cfg: the model.
      loss: a name of it.
      options: keywords of the loss, see `losses.policy.options_of`.
      temperature: of the rollout: logits are divided by it.
      max_completion_length: the constant that dr_grpo divides by.
    """

    cfg: ModelConfig
    loss: str
    options: tuple[tuple[str, Any], ...] = ()
    temperature: float = 1.0
    max_completion_length: int = 256

    kind: ClassVar[str] = "prompts"
    width: ClassVar[int] = 1
    head: ClassVar[str] = "lm"
    shares_prompt: ClassVar[bool] = True

    @property
    def beta(self) -> float:
        """What a nat of KL divergence from the reference costs."""
        return float(self._options["beta"])

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs under a reference are to be given."""
        return self.beta > 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL divergence is to be taken off the rewards (`advantages.combine`): the loss has none then."""
        return self.needs_reference and self._surrogate.kl_in_reward

    @property
    def estimator(self) -> str:
        """How advantages come from rewards: one of `advantages.ESTIMATORS`."""
        return self._surrogate.estimator

    @property
    def couples(self) -> bool:
        """Whether a token's loss depends on the entropy of all the others."""
        return bool(self._options["top_entropy_quantile"] < 1)

    def group(self, batch: Batch) -> int:
        """Rows that stay together when the batch is split."""
        return batches.rows_together(batch, self.width)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """The weight of the completions, truncated ones too as in TRL, and of the tokens that count."""
        return {
            "completions": batches.denominator(batches.weights(batch, 1).sum()),
            "tokens": batches.denominator(self._token_weights(batch).sum()),
        }

    def first_pass(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """`entropy` [R, T] without gradient."""
        params = jax.lax.stop_gradient(batches.weights_of(params, frozen))
        return self._score(params, batch, ("entropy",))

    def couple(self, batch: Batch) -> dict[str, jax.Array]:
        """Which tokens have the highest `entropy` of a whole batch: `high_entropy` [R, T] bool; and the sum of their
        weights, the same in every row: `high_entropy_tokens` [R].

        The quantile is one over tokens, whatever the weights of their examples, if they have one at all.
        """
        weights_RT = self._token_weights(batch)
        counted = weights_RT > 0
        entropies = jnp.where(counted, batch["entropy"], jnp.nan)
        threshold = jnp.nanquantile(entropies, 1 - self._options["top_entropy_quantile"])
        high = counted & (batch["entropy"] >= threshold)
        total = batches.denominator(jnp.where(high, weights_RT, 0).sum())
        return {"high_entropy": high, "high_entropy_tokens": jnp.broadcast_to(total, high.shape[:1])}

    def examples(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """Per completion, [E] float32: loss, weight; tokens, and sums over them of logps and entropy; `valid` (bool).

        `bonus` and `bonus_tokens` are the entropy of the tokens that a bonus acts on, and their number.
        """
        found, valid = self._evaluate(params, frozen, batch), batches.valid(batch, 1)
        values = {
            "loss": self._of_completions(found, batch),
            "logps": self._sums(found.logps, batch),
            "entropy": self._sums(found.entropy, batch),
            "tokens": self._sums(found.mask, batch),
            "bonus": self._sums(jnp.where(found.high, found.entropy, 0), batch),
            "bonus_tokens": self._sums(found.high, batch),
            "weight": batches.weights(batch, 1),
        }
        return {name: jnp.where(valid, x, 0.0) for name, x in values.items()} | {"valid": valid}

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        weights = jnp.asarray(examples["weight"])
        sums = {name: (weights * examples[name]).sum() for name in ("loss", "tokens", "bonus", "bonus_tokens")}
        completions, tokens = batches.denominator(weights.sum()), batches.denominator(sums["tokens"])
        loss = sums["loss"] / self._denominator({"completions": completions, "tokens": tokens})
        return float(loss - self._options["entropy_coef"] * sums["bonus"] / batches.denominator(sums["bonus_tokens"]))

    def __call__(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it. `aux` and `key` are other objectives'."""
        del aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        found = self._evaluate(params, frozen, batch)
        loss = (batches.weights(batch, 1) * self._of_completions(found, batch)).sum() / self._denominator(denominators)
        if coef := self._options["entropy_coef"]:
            bonus = jnp.where(found.high, self._token_weights(batch) * found.entropy, 0).sum()
            loss -= coef * bonus / (denominators["tokens"] if found.high_tokens is None else found.high_tokens)
        return loss, jax.lax.stop_gradient(self._metrics(found, batch))

    @functools.cached_property
    def _surrogate(self) -> losses.Surrogate:
        return losses.POLICY[self.loss]

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """All that a policy loss may be told; what this one does not take is off."""
        off = {"use_bias_correction_kl": False, "importance_sampling_level": self._surrogate.level}
        return {**losses.SHARED, **off, **losses.options_of(self.loss), **dict(self.options)}

    def _mask(self, batch: Batch) -> jax.Array:
        """[R, T] bool: the tokens that count."""
        mask = batches.scored(batch)
        if self._options["mask_truncated_completions"]:
            mask &= per_token(batch["truncated"], batch.get("segment_ids")) == 0
        return mask

    def _token_weights(self, batch: Batch) -> jax.Array:
        """[R, T]: the weight of its example at each token that counts, else 0."""
        weights_RS = batches.by_row(batches.weights(batch, 1)[:, None], batch)
        return jnp.where(self._mask(batch), per_token(weights_RS, batch.get("segment_ids")), 0)

    def _sums(self, x_RT: jax.Array, batch: Batch) -> jax.Array:
        """[E] sums over the tokens that count."""
        return batches.sums(x_RT, self._mask(batch), batch, 1)[:, 0]

    def _means(self, x_RT: jax.Array, batch: Batch) -> jax.Array:
        """[E] means over the tokens that count; 0 where there is none."""
        return self._sums(x_RT, batch) / jnp.maximum(self._sums(self._mask(batch), batch), 1)

    def _of_completions(self, found: "_Evaluated", batch: Batch) -> jax.Array:
        """[E]: what is summed over the completions."""
        is_mean = self._surrogate.aggregation == "sequence_mean"
        return (self._means if is_mean else self._sums)(found.losses, batch)

    def _denominator(self, denominators: Mapping[str, jax.Array]) -> jax.Array:
        """What that sum is divided by."""
        if self._surrogate.aggregation == "token_mean":
            return denominators["tokens"]
        length = self.max_completion_length if self._surrogate.aggregation == "constant" else 1
        return denominators["completions"] * length

    def _score(
        self, params: models.Params, batch: Batch, want: tuple[str, ...], differentiate: tuple[str, ...] = ("logps",)
    ) -> dict[str, jax.Array]:
        batch = {**batch, "mask": self._mask(batch)}
        options: dict[str, Any] = {"differentiate": differentiate, "temperature": self.temperature}
        return logprobs.score(self.cfg, params, batch, want=want, **options)

    def _evaluate(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> "_Evaluated":
        """The model, and the losses of its tokens."""
        options, mask, segment_ids = self._options, self._mask(batch), batch.get("segment_ids")
        differentiate = ("logps", "entropy") if options["entropy_coef"] else ("logps",)
        stats = self._score(batches.weights_of(params, frozen), batch, ("logps", "entropy"), differentiate)
        if self.couples and "high_entropy" not in batch:
            batch = {**batch, **self.couple({**batch, "entropy": jax.lax.stop_gradient(stats["entropy"])})}
        logps = stats["logps"]
        old_logps = jax.lax.stop_gradient(batch.get("old_logps", logps))
        advantages = batch["advantages"]
        if advantages.shape != mask.shape:
            advantages = per_token(advantages, segment_ids)
        sequences = Sequences(mask, segment_ids, batches.slots(batch))
        log_ratio = losses.policy_ratio(
            logps,
            old_logps,
            mask,
            segment_ids,
            level=options["importance_sampling_level"],
            num_segments=sequences.num_segments,
        )

        correction = None
        if options["importance_sampling_correction"]:
            names = ("mode", "clip_min", "clip_max")
            keywords = {name: options[f"importance_sampling_{name}"] for name in names}
            correction = losses.importance_ratio(old_logps, batch["sampling_logps"], sequences, **keywords)
        corrects_ratio = self._surrogate.corrects_ratio
        corrected = log_ratio
        if correction is not None and corrects_ratio:
            corrected = log_ratio + jnp.log(jnp.maximum(correction, 1e-8))
        keywords = {"sequences": sequences, **options}
        takes = inspect.signature(self._surrogate.function).parameters
        token_losses, seen = self._surrogate.function(
            corrected, logps, advantages, **{name: x for name, x in keywords.items() if name in takes}
        )
        if (threshold := options["off_policy_mask_threshold"]) is not None:
            sampled = batch.get("sampling_logps", old_logps)
            drift = sequences.mean(jnp.where(jnp.isnan(sampled), old_logps, sampled) - logps)
            token_losses = jnp.where((advantages >= 0) | (drift <= threshold), token_losses, 0)
        if self.couples:
            token_losses = jnp.where(batch["high_entropy"], token_losses, 0)
        if correction is not None and not corrects_ratio:
            token_losses *= correction
        if self.kl_in_reward:
            seen["kl"] = old_logps - batch["ref_logps"]
        elif self.needs_reference:
            ratio = log_ratio if options["use_bias_correction_kl"] else None
            seen["kl"] = losses.kl(logps, batch["ref_logps"], ratio)
            token_losses += self.beta * seen["kl"]
        if correction is not None:
            seen["correction"] = correction
        return _Evaluated(
            losses=jnp.broadcast_to(token_losses, mask.shape),
            logps=logps,
            old_logps=old_logps,
            entropy=stats["entropy"],
            mask=mask,
            high=batch["high_entropy"] if self.couples else mask,
            high_tokens=batch["high_entropy_tokens"][0] if self.couples else None,
            seen=seen,
        )

    def _metrics(self, found: "_Evaluated", batch: Batch) -> Metrics:
        """TRL's metrics: means over tokens, or where a ratio is one of a sequence over sequences."""
        mask, seen = found.mask, found.seen
        counted = self._sums(mask, batch) > 0
        of_sequences = self._options["importance_sampling_level"] in ("sequence", "sum")

        def mean(x_RT: jax.Array, of_sequences: bool = of_sequences) -> Mean:
            x_RT = jnp.asarray(x_RT, jnp.float32)
            return batches.mean(self._means(x_RT, batch), counted) if of_sequences else batches.mean(x_RT, mask)

        metrics: Metrics = {"entropy": mean(found.entropy, False)}
        if "kl" in seen:
            metrics["kl"] = mean(seen["kl"], False)
            # 0 at the first step of a run that begins at its reference.
            difference_RT = jnp.abs(found.logps - batch["ref_logps"])
            metrics["ref_logps_difference/max"] = Max(jnp.where(mask, difference_RT, 0).max())
        if "low" in seen:
            low, high = seen["low"], seen["high"]
            metrics |= {f"clip_ratio/{name}_mean": mean(x) for name, x in (("low", low), ("high", high))}
            metrics["clip_ratio/region_mean"] = mean(low | high)
            metrics["clip_ratio/low_min"] = Min(jnp.where(counted, self._means(low, batch), jnp.inf).min())
            metrics["clip_ratio/high_max"] = Max(jnp.where(counted, self._means(high, batch), 0).max())
        if "cispo" in seen:
            metrics["cispo_clip_ratio"] = mean(seen["cispo"])
        if "phi" in seen:
            metrics["vespo/phi_seq_mean"] = mean(seen["phi"], True)
        if "sampling_logps" in batch:
            difference_RT = jnp.abs(found.old_logps - batch["sampling_logps"])
            known = mask & ~jnp.isnan(difference_RT)
            metrics["sampling/sampling_logp_difference/mean"] = batches.mean(difference_RT, known)
            metrics["sampling/sampling_logp_difference/max"] = Max(jnp.where(known, difference_RT, 0).max())
        if "correction" in seen:
            ratio, one_a_sequence = seen["correction"], self._options["importance_sampling_mode"].startswith("sequence")
            metrics["sampling/importance_sampling_ratio/mean"] = mean(ratio, one_a_sequence)
            metrics["sampling/importance_sampling_ratio/min"] = Min(jnp.where(mask, ratio, jnp.inf).min())
            metrics["sampling/importance_sampling_ratio/max"] = Max(jnp.where(mask, ratio, 0).max())
        return metrics


class _Evaluated(NamedTuple):
    """What a batch's tokens gave, [R, T] each: losses, log-probs, those of the old policy, entropies, the mask, the
    tokens of high entropy (all, where none are left out) and the sum of their weights, and what is logged."""

    losses: jax.Array
    logps: jax.Array
    old_logps: jax.Array
    entropy: jax.Array
    mask: jax.Array
    high: jax.Array
    high_tokens: jax.Array | None
    seen: dict[str, jax.Array]


def make_policy(
    cfg: ModelConfig, loss: str, *, temperature: float = 1.0, max_completion_length: int = 256, **options: Any
) -> Policy:
    """The objective of a loss of `losses.policy.POLICY` by name, with its keywords.

    Raises:
      ValueError: an option, or the temperature, is out of its range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected one above 0: logits are divided by it")
    losses.check(loss, {**losses.options_of(loss), **options})
    return Policy(cfg, loss, tuple(sorted(options.items())), temperature, max_completion_length)
