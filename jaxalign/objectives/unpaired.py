"""The objective of single responses with a label: KTO, APO-zero and BCO against a reference.

Letters: R rows, T time, S sequences that a row can hold, E examples, W their width.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, lora, models
from jaxalign.losses import unpaired as losses
from jaxalign.metrics import Max, Mean, Metrics
from jaxalign.models.config import ModelConfig
from jaxalign.objectives import batches
from jaxalign.objectives.batches import Batch


@dataclass(frozen=True)
class Unpaired:
    """Responses that are desirable or not, one at a time: any loss of `losses.UNPAIRED`.

    Sequence 0 of an example is its prompt and response. KTO's second one, the mismatched, is the same prompt with the
    response of another example: it is scored without gradient for the reference point `kl`, a mean over the whole
    batch. BCO's `shift` comes from the mean rewards of all examples so far, this batch's included: `aux` keeps them as
    the leaf `reward_means`, see `losses.unpaired.reward_means`.

    Batch leaves: those of `batches`, `ref_logps` [R, T] float32 of all its sequences, `label` [R, S] (1 desirable, 0
    undesirable), where examples are weighted `weight` [R, S], which the means of KTO and BCO have too; and where it is
    known, as `couple` gives it, `kl` [R] or `reward_means` [R, 2, 2], the same in every row.

    Attributes:
      cfg: the model.
      loss: a name of it.
      options: keywords of the loss.
    """

    cfg: ModelConfig
    loss: str
    options: tuple[tuple[str, Any], ...] = ()

    head: ClassVar[str] = "lm"
    needs_reference: ClassVar[bool] = True
    shares_prompt: ClassVar[bool] = True

    @property
    def needs_mismatched(self) -> bool:
        """Whether an example has a second sequence, the mismatched one."""
        return self.kind == "labelled"

    @property
    def kind(self) -> str:
        """What an example is, see `unpaired_kind`."""
        return unpaired_kind(self.loss)

    @property
    def width(self) -> int:
        """Sequences of an example."""
        return batches.WIDTHS[self.kind]

    @property
    def couples(self) -> bool:
        """Whether an example's loss depends on the whole batch."""
        return self.needs_mismatched or self._shifts

    def group(self, batch: Batch) -> int:
        """Rows that stay together when the batch is split."""
        return batches.rows_together(batch, self.width)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """The weight of the examples; and how many there are, and of either label, for what is logged."""
        valid, desirable = batches.valid(batch, self.width), self._desirable(batch)
        return {
            "examples": batches.denominator(batches.weights(batch, self.width).sum()),
            "count": batches.denominator(valid.sum()),
            "desirable": (valid & desirable).sum().astype(jnp.float32),
            "undesirable": (valid & ~desirable).sum().astype(jnp.float32),
        }

    def init_aux(self) -> dict[str, jax.Array]:
        """What is known before the first step: BCO has seen no rewards."""
        return {"reward_means": jnp.zeros((2, 2), jnp.float32)} if self._shifts else {}

    def next_aux(self, aux: Mapping[str, jax.Array], metrics: Metrics) -> dict[str, jax.Array]:
        """The leaves of `aux` that a step changes: what BCO has seen, with this batch."""
        if not self._shifts:
            return {}
        seen = [jnp.stack(metrics[f"delta/{label}"]) for label in ("undesirable", "desirable")]  # (sum, weight) each
        means = jnp.stack([jnp.stack([total / batches.denominator(weight), weight]) for total, weight in seen])
        return {"reward_means": losses.merge_means(aux["reward_means"], means)}

    def first_pass(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """`log_ratios` [R, S] without gradient: KTO's of the mismatched, BCO's of the examples' own sequences.

        No other sequence is scored, and unpacked the model does not see them.
        """
        part = self._part(batch, int(self.needs_mismatched))
        params = jax.lax.stop_gradient(batches.weights_of(params, frozen))
        return self._log_ratios(logprobs.score(self.cfg, params, part)["logps"], part, batch)

    def couple(self, batch: Batch) -> dict[str, jax.Array]:
        """KTO's `kl` [R] or BCO's `reward_means` [R, 2, 2], alike in every row, from `log_ratios` of a whole batch."""
        log_ratios, weights = batches.of_example("log_ratios", batch, self.width), batches.weights(batch, self.width)
        if self.needs_mismatched:
            name, found = "kl", losses.mismatched_kl(log_ratios, weights)
        else:
            rewards = dict(self.options).get("beta", self._parameters["beta"].default) * log_ratios
            name, found = "reward_means", losses.reward_means(rewards, self._desirable(batch), weights)
        return {name: jnp.broadcast_to(found, (batch["tokens"].shape[0], *found.shape))}

    def examples(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """Per example, [E] float32: loss, rewards, logps and ref_logps (sums), label, tokens, weight; `valid` (bool).

        KTO has `mismatched`, too: the log-ratio of the mismatched sequence. BCO's loss is that without the batches
        before this one.
        """
        stats, own, batch = self._score(params, frozen, batch, ("logps",))
        values = self._values(stats["logps"], own, batch, self._point(batch, {}))
        if self.needs_mismatched:
            values["mismatched"] = batches.of_example("log_ratios", batch, self.width)
        values["weight"] = batches.weights(batch, self.width)
        valid = batches.valid(batch, self.width)
        return {name: jnp.where(valid, x, 0.0) for name, x in values.items()} | {"valid": valid}

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        weights = jnp.asarray(examples["weight"])
        if self.needs_mismatched:
            point = {"kl": losses.mismatched_kl(jnp.asarray(examples["mismatched"]), weights)}
        elif self._shifts:
            means = losses.reward_means(jnp.asarray(examples["rewards"]), jnp.asarray(examples["label"]), weights)
            point = {"shift": losses.reward_shift(means)}
        else:
            point = {}
        values, _ = self._call(examples["logps"], examples["ref_logps"], examples["label"], point)
        return float((weights * values).sum() / batches.denominator(weights.sum()))

    def __call__(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it; BCO's have `delta` and the means that it comes from."""
        del key
        denominators = batch.get("denominators") or self.denominators(batch)
        stats, own, batch = self._score(params, frozen, batch, ("logps", "entropy", "mean_logit"))
        point = self._point(batch, aux)
        values = self._values(stats["logps"], own, batch, point)
        weights, valid = batches.weights(batch, self.width), batches.valid(batch, self.width)
        loss = jnp.where(valid, weights * values["loss"], 0).sum() / denominators["examples"]

        one = jnp.ones((), jnp.float32)
        metrics: Metrics = (
            {"delta": Mean(point["shift"], one)} if self._shifts else {"kl": Mean(point.get("kl", 0 * one), one)}
        )
        scored = batches.scored(own)
        # 0 at the first step of a run that begins at its reference.
        difference_RT = jnp.abs(stats["logps"] - own["ref_logps"])
        metrics["ref_logps_difference/max"] = Max(jnp.where(scored, difference_RT, 0).max())
        metrics["entropy"] = batches.mean(stats["entropy"], scored)
        desirable_RT = logprobs.per_token(own["label"], own.get("segment_ids")) > 0
        margin, both = jnp.zeros((), jnp.float32), denominators["desirable"] * denominators["undesirable"] > 0
        for side, label, sign, of_label, of_label_RT in (
            ("chosen", "desirable", 1, self._desirable(batch), desirable_RT),
            ("rejected", "undesirable", -1, ~self._desirable(batch), ~desirable_RT),
        ):
            metrics[f"rewards/{side}"] = batches.mean(values["rewards"], valid & of_label)
            metrics[f"logps/{side}"] = batches.mean(values["logps"], valid & of_label)
            metrics[f"logits/{side}"] = batches.mean(stats["mean_logit"], scored & of_label_RT)
            rewards = jnp.where(valid & of_label, values["rewards"], 0).sum()
            margin += sign * rewards / batches.denominator(denominators[label])
            if self._shifts:
                of_label_E = jnp.where(of_label, weights, 0)
                metrics[f"delta/{label}"] = Mean((of_label_E * values["rewards"]).sum(), of_label_E.sum())
        # A difference of two means over the whole batch, which is not the mean of anything over a part of it.
        share = jnp.where(both, valid.sum() / denominators["count"], 0)
        metrics["rewards/margins"] = Mean(jnp.where(both, margin, 0), share)
        return loss, jax.lax.stop_gradient(metrics)

    @property
    def _function(self) -> Callable[..., losses.UnpairedLosses]:
        return losses.UNPAIRED[self.loss]

    @functools.cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._function).parameters

    @property
    def _shifts(self) -> bool:
        return "shift" in self._parameters

    def _desirable(self, batch: Batch) -> jax.Array:
        return batches.of_example("label", batch, self.width) > 0

    def _part(self, batch: Batch, place: int) -> Batch:
        """The batch with one sequence of each example alone: its row, or in packed rows nothing else in the mask."""
        if self.width == 1:
            return batch
        if "segment_ids" in batch:
            return {**batch, "mask": batch["mask"] & (batches.place(batch, self.width) == place)}
        whole = ("denominators", "shared_prefix")  # no leaf of rows; rows that begin alike are apart now
        return {name: x[place :: self.width] for name, x in batch.items() if name not in whole}

    def _sums(self, x_RT: jax.Array, part: Batch) -> jax.Array:
        """Sums over the sequence of each example that `_part` left: [E]."""
        width = self.width if "segment_ids" in part else 1
        return batches.sums(x_RT, part["mask"], part, width).sum(axis=1)

    def _log_ratios(self, logps_RT: jax.Array, part: Batch, batch: Batch) -> dict[str, jax.Array]:
        """The leaf `log_ratios` [R, S]: the same at each sequence of an example."""
        log_ratios = self._sums(logps_RT - part["ref_logps"], part)
        return {"log_ratios": batches.by_row(jnp.repeat(log_ratios[:, None], self.width, axis=1), batch)}

    def _score(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, want: tuple[str, ...]
    ) -> tuple[dict[str, jax.Array], Batch, Batch]:
        """Statistics of the examples' own sequences, the part of the batch that these are, and the batch with what
        ties its examples together, if it came without."""
        own = self._part(batch, 0)
        is_known = not self.couples or "kl" in batch or "reward_means" in batch
        in_one = self.width == 1 or "segment_ids" in batch  # the model sees all of a packed row anyway
        mask = own["mask"] if is_known or not in_one else batch["mask"]
        stats = logprobs.score(self.cfg, batches.weights_of(params, frozen), {**own, "mask": mask}, want=want)
        if is_known:
            return stats, own, batch
        if in_one:
            other = self._part(batch, int(self.needs_mismatched))
            found = self._log_ratios(jax.lax.stop_gradient(stats["logps"]), other, batch)
        else:
            found = self.first_pass(params, frozen, batch)
        batch = {**batch, **found}
        return stats, own, {**batch, **self.couple(batch)}

    def _point(self, batch: Batch, aux: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What the loss takes besides the examples: KTO's `kl`, BCO's `shift`."""
        if self.needs_mismatched:
            return {"kl": batch["kl"][0]}
        if self._shifts:
            means = batch["reward_means"][0]
            if "reward_means" in aux:
                means = losses.merge_means(aux["reward_means"], means)
            return {"shift": losses.reward_shift(means)}
        return {}

    def _values(
        self, logps_RT: jax.Array, own: Batch, batch: Batch, point: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Of each example [E]: loss, rewards, logps, ref_logps, label, tokens."""
        logps, ref_logps = self._sums(logps_RT, own), self._sums(own["ref_logps"], own)
        label = self._desirable(batch).astype(jnp.float32)
        values, logged = self._call(logps, ref_logps, label, point)
        tokens = self._sums(batches.scored(own), own)
        return {"loss": values, **logged, "logps": logps, "ref_logps": ref_logps, "label": label, "tokens": tokens}

    def _call(self, logps: Any, ref_logps: Any, label: Any, point: Mapping[str, Any]) -> losses.UnpairedLosses:
        return self._function(logps, ref_logps, label, **point, **dict(self.options))


def unpaired_kind(loss: str) -> str:
    """What an example of a loss is: `labelled` where there is a mismatched sequence, else `singles`."""
    return "labelled" if "kl" in inspect.signature(losses.UNPAIRED[loss]).parameters else "singles"


def make_unpaired(cfg: ModelConfig, loss: str, **options: Any) -> Unpaired:
    """The objective of a loss of `losses.UNPAIRED` by name, with its keywords.

    Raises:
      ValueError: an option is out of its range.
    """
    objective = Unpaired(cfg, loss, tuple(sorted(options.items())))
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    arrays = {p.name: one for p in objective._parameters.values() if p.kind is not p.KEYWORD_ONLY}
    jax.eval_shape(functools.partial(objective._function, **options), **arrays)  # computes nothing but checks numbers
    return objective
