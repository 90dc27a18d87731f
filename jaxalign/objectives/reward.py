"""The objectives of reward models: preferences by Bradley-Terry, and scores of several attributes.

Letters: R rows, S sequences that a row can hold, E examples, D model, K heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, lora, models
from jaxalign.losses import reward as losses
from jaxalign.metrics import Max, Metrics, Min
from jaxalign.models.config import ModelConfig
from jaxalign.objectives import batches
from jaxalign.objectives.batches import Batch


def score(cfg: ModelConfig, params: models.Params, batch: Batch) -> jax.Array:
    """What a reward model gives to each sequence, from the hidden state at its last token: float32, 0 for fillers.

    Args:
      cfg: a model with the head "score".
      params: its weights.
      batch: leaves tokens, positions [R, T] and ends [R, S] int32 (-1: no sequence), and those of a packed batch.

    Returns:
      [R, S] rewards of a model with one head; [R, S, K] of one with several.
    """
    ends_RS = batch["ends"]
    hidden_RTD = logprobs.hidden(cfg, params, batch)
    hidden_RSD = jnp.take_along_axis(hidden_RTD, jnp.maximum(ends_RS, 0)[..., None], axis=1)
    values_RSK = jnp.where(ends_RS[..., None] >= 0, models.value(cfg, params, hidden_RSD), 0)
    return values_RSK[..., 0] if values_RSK.shape[-1] == 1 else values_RSK


@dataclass(frozen=True)
class Reward(batches.Uncoupled):
    """A reward model of pairs: the chosen response is to have the higher score, by a margin where the data has one.

    Batch leaves: those of `score`, and where there are such `margin` and `weight` [R, S].

    Attributes:
      cfg: the model, with one head.
      center_rewards_coefficient: see `losses.bradley_terry`.
    """

    cfg: ModelConfig
    center_rewards_coefficient: float = 0.0

    kind: ClassVar[str] = "pairs"
    width: ClassVar[int] = 2
    head: ClassVar[str] = "score"
    needs_reference: ClassVar[bool] = False
    shares_prompt: ClassVar[bool] = True

    def group(self, batch: Batch) -> int:
        """Rows that stay together when the batch is split."""
        return batches.rows_together(batch, self.width)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """The weight of the pairs."""
        return {"pairs": batches.denominator(_weights(batch, self.width).sum())}

    def examples(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """Per pair, [E] float32: loss, rewards/chosen, rewards/rejected, weight; `valid` (bool): it is no filler."""
        rewards = batches.by_example(score(self.cfg, batches.weights_of(params, frozen), batch), self.width)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        margin = batches.of_example("margin", batch, self.width) if "margin" in batch else None
        pair_losses = losses.bradley_terry(
            chosen, rejected, margin, center_rewards_coefficient=self.center_rewards_coefficient
        )
        valid = _valid(batch, self.width)
        return {
            "loss": jnp.where(valid, pair_losses, 0),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "weight": _weights(batch, self.width),
            "valid": valid,
        }

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        return float((examples["weight"] * examples["loss"]).sum() / batches.denominator(examples["weight"].sum()))

    def __call__(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it. `aux` and `key` are other objectives'."""
        del aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        pair = self.examples(params, frozen, batch)
        loss = (pair["weight"] * pair["loss"]).sum() / denominators["pairs"]
        chosen, rejected, valid = pair["rewards/chosen"], pair["rewards/rejected"], pair["valid"]
        metrics = _extremes(jnp.stack([chosen, rejected], axis=1), valid[:, None])
        metrics["accuracy"] = batches.mean((chosen > rejected).astype(jnp.float32), valid)
        metrics["margin"] = batches.mean(chosen - rejected, valid)
        return loss, jax.lax.stop_gradient(metrics)


@dataclass(frozen=True)
class Attributes(batches.Uncoupled):
    """A model of several scores of a response, one head each: the mean squared error of all scores that are there.

    Batch leaves: those of `score`; `scores` [R, S, K] float32, NaN where an attribute was not scored; and where
    examples are weighted `weight` [R, S].

    Attributes:
      cfg: the model, with one head an attribute.
      reward_weights: what each attribute counts in the one reward; None: their mean.
    """

    cfg: ModelConfig
    reward_weights: tuple[float, ...] | None = None

    kind: ClassVar[str] = "scored"
    width: ClassVar[int] = 1
    head: ClassVar[str] = "score"
    needs_reference: ClassVar[bool] = False
    shares_prompt: ClassVar[bool] = True

    def group(self, batch: Batch) -> int:
        """Rows that stay together when the batch is split."""
        return batches.rows_together(batch, self.width)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """The scores that are there, each with the weight of its example."""
        return {"scores": batches.denominator((_weights(batch, 1) * self._scored(batch).sum(axis=1)).sum())}

    def examples(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """Per example, [E] float32: loss (sum of its squared errors), `scores` (their number), rewards (composed),
        weight; `values` [E, K], the heads' outputs, and `targets`, the scores; `valid` (bool) is False for fillers."""
        heads = (*batch["ends"].shape, -1)
        values = score(self.cfg, batches.weights_of(params, frozen), batch).reshape(heads)
        values = batches.by_example(values, 1)[:, 0]
        scored = self._scored(batch)
        errors = jnp.where(scored, losses.attributes(values, batches.of_example("scores", batch, 1)), 0)
        return {
            "loss": errors.sum(axis=1),
            "scores": scored.sum(axis=1).astype(jnp.float32),
            "rewards": losses.compose(values, self.reward_weights),
            "values": values,
            "targets": batches.of_example("scores", batch, 1),
            "weight": _weights(batch, 1),
            "valid": _valid(batch, 1),
        }

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        scores = batches.denominator((examples["weight"] * examples["scores"]).sum())
        return float((examples["weight"] * examples["loss"]).sum() / scores)

    def __call__(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch, and the composed reward's metrics. `aux` and `key` are other objectives'."""
        del aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        found = self.examples(params, frozen, batch)
        loss = (found["weight"] * found["loss"]).sum() / denominators["scores"]
        metrics = _extremes(found["rewards"], found["valid"])
        metrics["mse"] = batches.mean(found["loss"] / batches.denominator(found["scores"]), found["valid"])
        return loss, jax.lax.stop_gradient(metrics)

    def _scored(self, batch: Batch) -> jax.Array:
        """[E, K] bool: the scores that are there."""
        return ~jnp.isnan(batches.of_example("scores", batch, 1)) & _valid(batch, 1)[:, None]


def make_reward(cfg: ModelConfig, loss: str = "reward", **options: Any) -> Reward | Attributes:
    """The objective of a reward model by name: "reward" (center_rewards_coefficient) or "attributes" (reward_weights).

    Raises:
      ValueError: an option is out of its range, or the model has another number of heads than the loss.
    """
    if loss == "attributes":
        weights: Sequence[float] | None = options.get("reward_weights")
        if weights is not None and len(weights) != cfg.num_labels:
            raise ValueError(
                f"reward_weights has {len(weights)} numbers {tuple(weights)}, the model {cfg.num_labels} score heads: "
                "give one for each attribute of data.score_columns, in that order"
            )
        return Attributes(cfg, None if weights is None else tuple(weights))
    if cfg.num_labels > 1:
        raise ValueError(f"a reward of pairs is one score, the model has {cfg.num_labels}: use the loss attributes")
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(lambda c, r: losses.bradley_terry(c, r, **options), one, one)  # nothing but the check of its number
    return Reward(cfg, **options)


def _valid(batch: Batch, width: int) -> jax.Array:
    """[E] bool: the examples that are no fillers. A score needs no scored tokens."""
    return (batches.by_example(batch["ends"], width) >= 0).all(axis=1)


def _weights(batch: Batch, width: int) -> jax.Array:
    """[E] float32: what each example counts, 0 for fillers."""
    valid = _valid(batch, width)
    return jnp.where(valid, batches.of_example("weight", batch, width) if "weight" in batch else 1.0, 0.0)


def _extremes(rewards: jax.Array, valid: jax.Array) -> Metrics:
    """TRL's summary of rewards [E] or [E, W]."""
    valid = jnp.broadcast_to(valid, rewards.shape)
    return {
        "min_reward": Min(jnp.where(valid, rewards, jnp.inf).min()),
        "mean_reward": batches.mean(rewards, valid),
        "max_reward": Max(jnp.where(valid, rewards, -jnp.inf).max()),
    }
