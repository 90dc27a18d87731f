"""The reference model as data: its token log-probs, scored live before each step or once and kept on disk.

Letters: R rows, T time, S sequences that a row can hold.
"""

import functools
import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxalign import logprobs, models, paths, sharding, step
from jaxalign.data.batching import FILLER, EvalBatches
from jaxalign.data.sources import Prepared
from jaxalign.models.config import ModelConfig

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Score = Callable[[models.Params, Batch], jax.Array]

VERSION = 1  # of the file, and of whatever changes the numbers in it


LEAVES = ("tokens", "positions", "mask", "shared_prefix", "segment_ids", "prefix_ids")  # that scoring looks at


def make_score(cfg: ModelConfig, *, width: int = 2, micro_batches: int = 1, temperature: float = 1.0) -> Score:
    """A function (params, batch) -> token log-probs [R, T] float32 of the masked tokens; jit it.

    The batch, whose examples have `width` sequences, is scored in as many parts as the train step uses, so that scoring
    needs no more memory than training. Logits are divided by `temperature`.
    """
    options: dict[str, Any] = {} if temperature == 1 else {"temperature": temperature}

    def score(params: models.Params, batch: Batch) -> jax.Array:
        batch = {name: batch[name] for name in LEAVES if name in batch}
        if micro_batches == 1:
            return logprobs.score(cfg, params, batch, **options)["logps"]
        together = 1 if "segment_ids" in batch else width  # rows that a part holds all of
        micros = step.split_batch(batch, micro_batches, together)
        logps = jax.lax.map(lambda micro: logprobs.score(cfg, params, micro, **options)["logps"], micros)
        return step.join_batch(logps, together)

    return score


def frozen_copy(cfg: ModelConfig, params: models.Params) -> models.Params:
    """The weights of a reference as the model uses them, sharing no buffer with `params`; jit it."""
    return jax.tree.map(jnp.copy, models.as_used(cfg, params))


def mix(policy: models.Params, reference: models.Params, alpha: float) -> models.Params:
    """alpha * policy + (1 - alpha) * reference, leaf by leaf: a reference that follows the policy.

    Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656 (TR-DPO).
    """
    return jax.tree.map(lambda p, r: (alpha * p + (1 - alpha) * r).astype(r.dtype), policy, reference)


class Cached:
    """Token log-probs of every sequence of a prepared data set, looked up by the example's number.

    Attributes:
      prepared: the data set.
      logps: flat float32, the sequences' tokens one after another (those of example 0, of example 1, ...); 0 where none
        is scored.
    """

    def __init__(self, prepared: Prepared, logps: np.ndarray):
        self.prepared, self.logps = prepared, logps
        self._offsets = np.concatenate([[0], np.cumsum(prepared.lengths.reshape(-1), dtype=np.int64)])

    def __call__(self, batch: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> np.ndarray:
        """ref_logps [R, T] float32 for a batch of `data.batching` (`rows`: which global rows these are)."""
        out = np.zeros(batch["tokens"].shape, np.float32)
        ids, ends, segments = batch["row_ids"], batch["ends"], batch.get("segment_ids")
        rows = np.arange(len(out)) if rows is None else rows
        for row, slot in np.argwhere(ids != FILLER):
            sequence = (rows[row] if segments is None else slot) % self.prepared.width
            last = self.span(int(ids[row, slot]), int(sequence)).stop
            end = int(ends[row, slot]) + 1
            # A segment holds the last tokens of its sequence; a prompt that stands once is in none, and not scored.
            count = end if segments is None else np.count_nonzero(segments[row] == slot + 1)
            out[row, end - count : end] = self.logps[last - count : last]
        return out

    def span(self, example: int, sequence: int) -> slice:
        """Where in `logps` the tokens of one of an example's sequences stand."""
        at = self.prepared.width * example + sequence
        return slice(*self._offsets[at : at + 2])


def cache_file(folder: epath.Path, *, model: str, prepared: Prepared, cfg: ModelConfig) -> epath.Path:
    """Where the log-probs lie; another model, data, kind, template, length or dtype is another file.

    So is another selection or order, on which the mismatched completions of `labelled` examples depend.
    """
    what = [prepared.kind, prepared.fingerprint, prepared.meta["max_length"]]
    identity = [VERSION, model, *what, cfg.compute_dtype]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return folder / f"reference-{digest}.npz"


def cached(
    path: epath.Path,
    prepared: Prepared,
    score: Score,
    params: Callable[[], models.Params],
    *,
    mesh: Any,
    batch_size: int,
    buckets: Any = None,
    packing: str = "off",
    packed_length: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Cached:
    """The log-probs of all rows, from `path` or scored now and written there.

    Args:
      path: from `cache_file`.
      score: jitted `make_score`.
      params: gives the reference's weights; not called when the file is there.
      mesh: the current mesh.
      batch_size: examples scored at a time over all devices.
      buckets, packing, packed_length: as of `EvalBatches`.
      on_progress: called with (batches done, batches in all).

    Raises:
      ValueError: the file is there, but damaged or of another size (it names the file to delete).
    """
    if (found := _read(path, int(prepared.lengths.sum()))) is not None:
        log.info("reference log-probs of %d examples from the cache %s", len(prepared), path)
        return Cached(prepared, found)
    result = score_all(
        prepared,
        score,
        params(),
        mesh=mesh,
        batch_size=batch_size,
        on_progress=on_progress,
        buckets=buckets,
        packing=packing,
        packed_length=packed_length,
    )
    content = io.BytesIO()
    np.savez(content, logps=result.logps)
    keep(path, content.getvalue())
    return result


def score_all(
    prepared: Prepared,
    score: Score,
    params: models.Params,
    *,
    mesh: Any,
    batch_size: int,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    **rows: Any,
) -> Cached:
    """The log-probs of all rows, scored now; as `cached`, on every process. `rows`: buckets, packing, packed_length."""
    result = Cached(prepared, np.zeros(int(prepared.lengths.sum()), np.float32))
    batches = EvalBatches(
        prepared,
        batch_size=batch_size,
        **rows,
        row_multiple=sharding.axis_size(sharding.ROWS, mesh),
        rows=functools.partial(sharding.process_rows, mesh),
    )
    on_progress(0, len(batches))
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    for n in range(len(batches)):
        layout = batches.layout(n)
        # Every process keeps the log-probs of all rows: a shuffled batch may ask it for any of them.
        logps_RT = np.asarray(whole(score(params, place(mesh, batches[n]))))
        for row, slot in np.argwhere(layout.examples != FILLER):
            last = result.span(int(layout.examples[row, slot]), int(layout.sequences[row, slot])).stop
            start, count = int(layout.starts[row, slot]), int(layout.counts[row, slot])
            result.logps[last - count : last] = logps_RT[row, start : start + count]
        on_progress(n + 1, len(batches))
    return result


def keep(path: epath.Path, content: bytes) -> None:
    """Writes a file of the cache, the same on every process."""
    if jax.process_index() == 0 or not paths.is_remote(path):  # a local folder may be each process's own
        paths.make_folder(path.parent, private=True)
        paths.replace(path, content)


def _read(path: epath.Path, total: int) -> np.ndarray | None:
    """The log-probs in a cache file, checked by its CRC; None unless every process has one.

    Raises:
      ValueError: the file is there, but is not what was written (it names the file to delete).
    """
    if not is_everywhere(path):
        return None
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            logps = file["logps"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and start again") from error
    if logps.shape != (total,) or logps.dtype != np.float32:
        raise ValueError(f"{path} holds {logps.dtype} {logps.shape}, expected float32 ({total},); delete it")
    return logps


def is_everywhere(path: epath.Path) -> bool:
    """Whether every process finds the file; what follows may be a collective."""
    if jax.process_count() == 1:
        return path.exists()
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(path.exists())).all())


def place(mesh: Any, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A host batch on the devices, without what only the host needs."""
    n_rows = sharding.global_rows(mesh, len(batch["tokens"]))
    return sharding.place_batch(mesh, {name: x for name, x in batch.items() if name != "row_ids"}, n_rows)


def check_start(difference: float, *, compute_dtype: str) -> None:
    """Checks the first step of a run whose policy begins as its reference.

    Args:
      difference: largest difference of a token's log-prob between the train step and the reference's scoring, in nats.
      compute_dtype: of the model.

    Raises:
      ValueError: it is too large to be rounding.
    """
    limit = {"float32": 1e-3}.get(compute_dtype, 0.5)
    if not difference <= limit:
        raise ValueError(
            f"the policy begins as its reference, but a token's log-prob differs by {difference:.3g} nats between them "
            f"at the first step (rounding in {compute_dtype} gives under {limit:g}). The reference log-probs belong to "
            "other weights or other rows: delete the cache (data.cache_dir, reference-*.npz) if reference.mode is "
            "cached; otherwise this is a bug in jaxalign: please report it with the run's config.json"
        )
