"""A reward model as a reward: completions scored on the mesh, beside the policy, as `python -m jaxalign.score` does."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import generate, score, sharding
from jaxalign.data import chat
from jaxalign.models import ModelConfig, Params

_PROBE = " jaxalign-probe-5f3a9c \n"  # blanks around it, as some templates strip answers


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Scores of completions; see `load`.

    Attributes:
      cfg, params, tokenizer: the reward model's own; params lie on `mesh`.
      policy: the policy's tokenizer where it and its chat template are the reward model's too, else None.
      weights: [K] of the model's outputs in the score.
      max_length: tokens of prompt and completion that are read, from the beginning.
      batch_size: completions scored at once.
      as_chat: prompts that are text are a user's message.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Any
    policy: Any
    mesh: jax.sharding.Mesh | None
    weights: np.ndarray
    max_length: int
    batch_size: int
    as_chat: bool

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """[C] float32 of this process's completions; several processes call it at the same time, each with its own.

        Args:
          prompts: [C] texts, or lists of messages.
          completions: [C] texts, or lists of messages that follow.
          completion_ids: [C] the tokens that the policy sampled.
        """
        sequences = [
            self.encode(prompt, completion, ids)
            for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True)
        ]
        every, own = _of_all_processes([ids[: self.max_length] for ids in sequences])
        with sharding.use_mesh(self.mesh):
            outputs_CK = score.values(self.cfg, self.params, every, self.batch_size, self.max_length, self.mesh)
        return (outputs_CK[own] @ self.weights).astype(np.float32)

    def encode(self, prompt: Any, completion: Any, completion_ids: Sequence[int]) -> list[int]:
        """Token ids of a prompt with its completion as the reward model was trained on them.

        With the policy's tokenizer and template these are the sampled ones between the prompt and the turn's end. With
        others, or where the template does more with an answer than to write it down, it is rendered anew.
        """
        is_text = isinstance(completion, str) and isinstance(prompt, str)
        if self.policy is not None and not self.as_chat and (is_text or len(completion) == 1):
            end = [self.policy.eos_token_id] if is_text else self._closing
            if end is not None:
                ids = list(completion_ids)
                while ids and ids[-1] in self.policy.all_special_ids:
                    ids.pop()
                return [*chat.encode_prompt(self.policy, prompt), *ids, *end]
        return score.encode(self.tokenizer, prompt, completion, self.as_chat)

    @functools.cached_property
    def _closing(self) -> list[int] | None:
        """The ids that the template writes behind an answer; None if it changes answers, or what stands before them."""
        asked = [{"role": "user", "content": "?"}]
        answered = chat.render(self.policy, [*asked, {"role": "assistant", "content": _PROBE}])
        before, found, after = answered.partition(_PROBE)
        if not found or before != chat.render(self.policy, asked, add_generation_prompt=True):
            return None
        ids: list[int] = self.policy(after, add_special_tokens=False)["input_ids"]
        return ids


def load(
    path: str,
    policy: Any,
    *,
    mesh: jax.sharding.Mesh | None = None,
    step: str | None = None,
    adapter: str | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    weights: Sequence[float] | None = None,
    as_chat: bool = False,
) -> RewardModel:
    """A reward model, on the mesh that the policy is on, sharded by the same rules.

    Args:
      path: a Hugging Face folder of a ...ForSequenceClassification, a hub id, or the folder of a run.
      policy: the policy's tokenizer, whose ids `completion_ids` are.
      step, adapter: as of `generate.load`.
      max_length: tokens that are read, from the beginning; None: the model's positions, which no call exceeds.
      batch_size: completions scored at once, rounded up to the mesh's rows.
      weights: of the model's outputs in the score; None: its own, else their mean.
      as_chat: prompts that are text become a user's message, and their completions the assistant's.

    Raises:
      ValueError: no reward model is there, or an option does not fit it.
    """
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise ValueError(f"batch_size={batch_size}, max_length={max_length}: expected at least 1")
    model = generate.load(path, step, mesh, head="score", adapter=adapter)
    positions, groups = model.cfg.max_position_embeddings, sharding.axis_size(sharding.ROWS, mesh)
    return RewardModel(
        model.cfg,
        model.params,
        model.tokenizer,
        policy if _is_same(model.tokenizer, policy) else None,
        mesh,
        score.sum_weights(model.cfg, weights),
        min(max_length or positions, positions),
        -(-batch_size // groups) * groups,
        as_chat,
    )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same ids of text and of messages."""
    if not (one.is_fast and other.is_fast):  # others don't tell all that they do
        return False
    return (
        one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        and one.eos_token_id == other.eos_token_id
        and chat.template_of(one) == chat.template_of(other)
    )


def _of_all_processes(rows: list[list[int]]) -> tuple[list[list[int]], slice]:
    """The token ids that all processes brought, one process after another, and which of them are this one's."""
    if jax.process_count() == 1:
        return rows, slice(None)
    from jax.experimental import multihost_utils

    def gather(values: Any) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))

    sizes_N2 = gather([len(rows), max(map(len, rows), default=0)])
    padded = np.full((sizes_N2[:, 0].max(), sizes_N2[:, 1].max()), -1, np.int32)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = ids
    every = [
        row[row >= 0].tolist()
        for part, count in zip(gather(padded), sizes_N2[:, 0], strict=True)
        for row in part[:count]
    ]
    start = int(sizes_N2[: jax.process_index(), 0].sum())
    return every, slice(start, start + len(rows))
