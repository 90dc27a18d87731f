"""Supervised fine-tuning on chats and texts: the mean of a token loss over all scored tokens of a batch.

Letters: R rows, T time, E examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, lora, losses, models
from jaxalign.metrics import Metrics
from jaxalign.models.config import ModelConfig
from jaxalign.objectives import batches
from jaxalign.objectives.batches import Batch


@dataclass(frozen=True)
class Sft(batches.Uncoupled):
    """Imitate the scored tokens: any loss of `losses.TOKEN_LOSSES`, summed over them and divided by their number.

    Batch leaves: tokens, positions [R, T] int32; mask [R, T] bool; and packed, segment_ids [R, T] and ends [R, S]
    int32. An example is one sequence. One with nothing masked is a filler and counts nowhere.

    Attributes:
      cfg: the model.
      name: the loss of a token.
    """

    cfg: ModelConfig
    name: str = "sft"

    kind: ClassVar[str] = "chats"
    width: ClassVar[int] = 1
    head: ClassVar[str] = "lm"
    needs_reference: ClassVar[bool] = False
    shares_prompt: ClassVar[bool] = False  # earlier turns of a chat may be scored

    def group(self, batch: Batch) -> int:
        """Rows that stay together when the batch is split."""
        return batches.rows_together(batch, self.width)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """Weights of the scored tokens, each that of its example: a float32 scalar."""
        total = (batches.weights(batch, 1) * self._sums(jnp.ones(batch["tokens"].shape), batch)).sum()
        return {"tokens": batches.denominator(total)}

    def examples(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """Per example, [E] float32: sums over its scored `tokens` of the `loss`, of the `nll`, and of those `correct`.

        `valid` (bool) is False for fillers; where the batch has weights there is `weight`.
        """
        stats = logprobs.score(self.cfg, batches.weights_of(params, frozen), batch, want=("logps", "correct"))
        values = {
            "loss": self._sums(losses.TOKEN_LOSSES[self.name](stats["logps"]), batch),
            "nll": self._sums(-stats["logps"], batch),
            "correct": self._sums(stats["correct"], batch),
            "tokens": self._sums(jnp.ones_like(stats["logps"]), batch),
        }
        if "weight" in batch:
            values["weight"] = batches.weights(batch, 1)
        return values | {"valid": batches.valid(batch, 1)}

    def total(self, examples: Mapping[str, Any]) -> float:
        """The loss of all `examples` together, as if they were one batch."""
        weights = examples.get("weight", examples["valid"].astype(jnp.float32))
        tokens = batches.denominator((weights * examples["tokens"]).sum())
        return float((weights * examples["loss"]).sum() / tokens)

    def __call__(
        self, params: models.Params, frozen: lora.Frozen | None, batch: Batch, aux: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a (micro-)batch and TRL's metrics of it. `aux` and `key` are other objectives'."""
        del aux, key
        denominators = batch.get("denominators") or self.denominators(batch)
        want = ("logps", "entropy", "correct")
        stats = logprobs.score(self.cfg, batches.weights_of(params, frozen), batch, want=want)
        token_losses = losses.TOKEN_LOSSES[self.name](stats["logps"])
        loss = (batches.weights(batch, 1) * self._sums(token_losses, batch)).sum() / denominators["tokens"]
        scored_RT = batches.scored(batch)
        metrics: Metrics = {
            "entropy": batches.mean(stats["entropy"], scored_RT),
            "mean_token_accuracy": batches.mean(stats["correct"], scored_RT),
            "nll": batches.mean(-stats["logps"], scored_RT),
        }
        return loss, jax.lax.stop_gradient(metrics)

    def _sums(self, x_RT: jax.Array, batch: Batch) -> jax.Array:
        """[E] sums over the scored tokens of each example."""
        return batches.sums(x_RT, batches.scored(batch), batch, 1)[:, 0]
