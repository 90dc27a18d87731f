"""Checkpoints of a run: asynchronous, committed atomically, verified at restore; Orbax writes and reads the arrays.

Layout of a run's checkpoint folder:

    <folder>/<step>/state/           the arrays, one OCDBT database whatever mesh wrote it, by their paths in the tree
    <folder>/<step>/record/metadata  JSON: meta (the caller's), metrics, each leaf's dtype, shape and checksum; a CRC
    <folder>/<step>.aside            put aside by a restore, because it is invalid or lies after the restored step
    <folder>/<step>.deleting         an old step on its way out;  <step>.replaced: the former copy of a step saved anew

A step's folder gets its final name by one rename after everything in it is written, so a process killed at any moment
leaves the previous checkpoints as they were; what it left half-written is removed at the next start. In a bucket, which
has no rename, the last object written to a step says that it is whole (`_is_committed`), and is the first to go.

Orbax's CheckpointManager is not used: it deletes old steps in the thread that commits the new one, so that one
undeletable folder fails the run; and it asks for JAX's preemption sync point from that thread with an old step number,
where that service expects the loop's own count of steps (`signals.py`). Its async checkpointer does the hard part.
"""

import concurrent.futures
import contextlib
import functools
import gc
import itertools
import json
import logging
import math
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxalign import paths
from jaxalign.messages import listed

log = logging.getLogger(__name__)

Tree = Any
ASIDE, DELETING, REPLACED = ".aside", ".deleting", ".replaced"
UNFINISHED, COMMITTED = ".orbax-checkpoint-tmp", "commit_success.txt"  # Orbax's names, here without its import
LISTED = 6  # of what a message lists
WRITE_TIMEOUT_S = 3600  # a slow network disk is no reason to fail a run; Orbax's own limit is 1200 s


class InvalidCheckpoint(ValueError):
    """A checkpoint that can't be used: truncated, missing files, or other values than were saved."""


class Restored(NamedTuple):
    step: int
    state: Tree
    meta: dict[str, Any]


def _mix(words: Any, xp: Any) -> Any:
    """uint32 array -> the same shape: each word mixed with its position. A leaf's hash is the sum modulo 2^32.

    Integer sums are exact in every order, so the hash depends on no mesh and no layout. For a given position the mix is
    a bijection of the word: any change within one word changes the sum; other changes escape with a chance of 2^-32. (A
    plain weighted sum would miss an even number of flipped sign bits.)
    """
    position = xp.zeros((1,) * words.ndim, np.uint32)
    for axis, size in enumerate(words.shape):
        along = xp.arange(size, dtype=np.uint32).reshape([-1 if a == axis else 1 for a in range(words.ndim)])
        position = position * np.uint32(size % 2**32) + along
    mixed = words + position * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return mixed ^ (mixed >> np.uint32(13))


@jax.jit
def _hash_device(x: jax.Array) -> jax.Array:
    """Bits of `x` (8 to 64 bits an element) -> uint32 scalar, computed where the shards are.

    Summed over the layers first: XLA on CPUs fuses this with the mix (1.1 against 5.3 ns an element of a 30-layer
    kernel, and no temporary of the leaf's size), but only where it is kept from joining the two sums.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = 8 * min(x.dtype.itemsize, 4)  # 64-bit elements become two words along a new last axis
    words = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    mixed = _mix(words.reshape(words.shape or (1,)), jnp)
    return jax.lax.optimization_barrier(mixed.sum(axis=0, dtype=jnp.uint32)).sum(dtype=jnp.uint32)


def _hash_host(x: np.ndarray) -> np.uint32:
    """As `_hash_device`, for an array in host memory."""
    words = np.ascontiguousarray(x).reshape(*x.shape, 1).view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    with np.errstate(over="ignore"):
        return _mix(words.astype(np.uint32), np).sum(dtype=np.uint32)


def checksums(tree: Tree) -> dict[str, int]:
    """Leaf path -> uint32 checksum of the leaf's bits, equal whatever mesh, layout or number of processes holds it.

    On several processes all of them must call it: sharded leaves are reduced by a collective.
    """
    hashes: dict[str, Any] = {}
    for path, leaf in _raw_leaves(tree).items():
        if isinstance(leaf, jax.Array):
            with jax.set_mesh(None):  # under the caller's mesh, a leaf on other devices than the mesh's is an error
                hashes[path] = _hash_device(leaf)
        else:
            hashes[path] = _hash_host(leaf)
    return {path: int(value) for path, value in jax.device_get(hashes).items()}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _paths(tree: Tree) -> dict[str, Any]:
    """Leaves by path: attribute names, dict keys and indices joined by '/'. None and empty containers are no leaves."""
    pairs = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in jax.tree.leaves_with_path(tree)]
    leaves = dict(pairs)
    if len(leaves) != len(pairs):
        names = [path for path, _ in pairs]
        double = sorted({path for path in names if names.count(path) > 1})
        raise ValueError(f"two leaves of the state have one path: {double[:5]}; rename a key that holds a '/'")
    return leaves


def _raw_leaves(tree: Tree) -> dict[str, jax.Array | np.ndarray]:
    """Leaves as arrays of numbers: PRNG keys as their data; scalars and what one process alone holds on the host."""
    raw: dict[str, jax.Array | np.ndarray] = {}
    for path, leaf in _paths(tree).items():
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array) or (jax.process_count() > 1 and leaf.is_fully_addressable):
            leaf = np.asarray(leaf)
            if leaf.dtype.kind not in "biufV":
                raise ValueError(
                    f"state leaf {path} is of type {leaf.dtype}; a checkpoint holds numbers: move it into `meta`"
                )
        raw[path] = leaf
    return raw


def _describe(leaf: Any) -> dict[str, Any]:
    """The dtype and shape of a leaf (array, abstract array or scalar) as they stand in the record."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _check_structure(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """ValueError with all differences unless both hold the same paths with the same dtypes and shapes."""
    missing = sorted(wanted.keys() - saved.keys())
    extra = sorted(saved.keys() - wanted.keys())
    differing = []
    for path in sorted(wanted.keys() & saved.keys()):
        want, have = _describe(wanted[path]), saved[path]
        if (want["dtype"], want["shape"]) != (have["dtype"], have["shape"]):
            differing.append(f"{path} is {have['dtype']}{have['shape']}, expected {want['dtype']}{want['shape']}")
    parts = [
        ("not in the checkpoint", missing),
        ("only in the checkpoint", extra),
        ("of another shape or type", differing),
    ]
    if any(found for _, found in parts):
        text = "; ".join(f"{len(found)} {what}: {listed(found, LISTED)}" for what, found in parts if found)
        raise ValueError(
            f"{where} holds another state than this run's ({text}); has the model or the optimizer changed?"
        )


def _missing_step(step: str | int, folder: epath.Path, steps: list[int], more: str = "") -> ValueError:
    there = f"steps there: {listed([str(one) for one in steps], LISTED)}{more}" if steps else "there is none"
    return ValueError(f"no checkpoint {step!r} in {folder} ({there})")


def _place(folder: paths.PathLike) -> epath.Path:
    """A folder as Orbax wants it: absolute."""
    return paths.at(folder) if paths.is_remote(folder) else paths.at(folder).absolute()


def _entries(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder, if it is there."""
    return list(folder.iterdir()) if folder.exists() else []


def _is_committed(path: epath.Path) -> bool:
    """Whether a step's folder was written to its end: its name says so, in a bucket its last object."""
    return (path / COMMITTED).exists() if paths.is_remote(path) else path.exists()


def list_steps(folder: paths.PathLike) -> list[int]:
    """Steps with a committed checkpoint in `folder`, ascending, not yet checked; [] if there is no folder."""
    return sorted(int(path.name) for path in _entries(_place(folder)) if path.name.isdigit() and _is_committed(path))


def _read_record(folder: epath.Path, step: int) -> dict[str, Any]:
    path = folder / str(step) / "record" / "metadata"
    try:
        wrapped = json.loads(path.read_text())
        record = json.loads(wrapped["record"])
        intact = zlib.crc32(wrapped["record"].encode()) == wrapped["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"its record {path} can't be read ({type(error).__name__}: {error})") from error
    if not intact:
        raise InvalidCheckpoint(f"its record {path} was changed after it was written (CRC differs)")
    return record


def read_meta(folder: paths.PathLike, step: int) -> dict[str, Any]:
    """The `meta` that was given to `save` for this step; InvalidCheckpoint if it is missing or was altered."""
    return _read_record(_place(folder), step)["meta"]


def _score(record: dict[str, Any], metric: str | None) -> float | None:
    """The metric's value; None where it was not measured or is NaN, which is never best."""
    value = record["metrics"].get(metric)
    return None if value is None or math.isnan(value) else value


def _ranked(folder: epath.Path, metric: str | None = None, mode: str | None = None) -> list[int]:
    """Steps that carry a score, best first, the later one first among equals. Without `metric`: each record's own."""
    scored = []
    for step in list_steps(folder):
        try:
            record = _read_record(folder, step)
        except InvalidCheckpoint:
            continue  # it can't be restored either, so it is no candidate; a restore says why
        value = _score(record, metric or record["best_metric"])
        if value is not None:
            scored.append((value if (mode or record["best_mode"]) == "max" else -value, step))
    return [step for _, step in sorted(scored, reverse=True)]


def _read(folder: epath.Path, step: int, abstract: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Leaves at `abstract`'s paths, on its shardings; InvalidCheckpoint unless each has the bits that were saved."""
    import orbax.checkpoint as ocp

    item, restore_args, on_host = {}, {}, {}
    for path, leaf in abstract.items():
        sharding = getattr(leaf, "sharding", None)
        local = sharding is None or (jax.process_count() > 1 and sharding.is_fully_addressable)
        if _is_key(leaf):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            shape, dtype = data.shape, data.dtype
        else:
            shape, dtype = np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        item[path] = jax.ShapeDtypeStruct(shape, dtype)
        if local:
            on_host[path] = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
            restore_args[path] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            restore_args[path] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype)
    try:
        with _quiet_asyncio():
            arrays = ocp.PyTreeCheckpointHandler().restore(
                folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
            )
        found = checksums(arrays)
    except Exception as error:  # Orbax and tensorstore raise most kinds for damaged files
        reason = " ".join(str(error).split("[tensorstore_spec")[0].split())
        raise InvalidCheckpoint(f"its arrays can't be read ({type(error).__name__}: {reason[:400]})") from error
    wrong = [path for path, value in found.items() if value != record["leaves"][path]["checksum"]]
    if wrong:
        raise InvalidCheckpoint(
            f"{len(wrong)} arrays have other bits than were saved (checksum differs): {listed(wrong, LISTED)}"
        )
    leaves = {}
    for path, leaf in abstract.items():
        array = arrays[path]
        if on_host.get(path):
            array = jax.device_put(array, getattr(leaf, "sharding", None))
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=record["leaves"][path]["key_impl"])
        elif isinstance(leaf, bool | int | float):
            array = array.item()
        leaves[path] = array
    return leaves


@contextlib.contextmanager
def _quiet_asyncio() -> Iterator[None]:
    """Orbax raises the first error of a damaged checkpoint; asyncio would print pages of the other arrays' errors."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()  # the other tasks complain when they are dropped
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _everywhere(attempt: Callable[[], Any]) -> Any:
    """The result of `attempt`; InvalidCheckpoint on all processes if it was for any: they fall back together."""
    result, problem = None, None
    try:
        result = attempt()
    except InvalidCheckpoint as error:
        problem = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        bad = np.flatnonzero(multihost_utils.process_allgather(np.array(problem is not None)))
        if problem is None and bad.size:
            problem = InvalidCheckpoint(f"process {bad[0]} could not read it")
    if problem is not None:
        raise problem
    return result


def _first_valid(
    folder: epath.Path, steps: Iterable[int], select: Callable[[dict[str, Any]], dict[str, Any]], abstract: Tree
) -> Restored:
    """The first valid step of `steps`. `select`: the part of the saved leaves that is wanted."""
    wanted = _paths(abstract)
    invalid: dict[int, str] = {}
    for step in steps:
        try:
            record = _everywhere(functools.partial(_read_record, folder, step))
            _check_structure(select(record["leaves"]), wanted, f"checkpoint {step} in {folder}")
            leaves = _everywhere(functools.partial(_read, folder, step, wanted, record))
        except InvalidCheckpoint as error:
            invalid[step] = str(error)
            log.warning("checkpoint %d in %s is INVALID: %s", step, folder, error)
            continue
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[path] for path in wanted])
        if invalid:
            log.warning("falling back to checkpoint %d, the newest valid one", step)
        return Restored(step, state, record["meta"])
    reasons = "; ".join(f"{step}: {reason}" for step, reason in invalid.items())
    raise InvalidCheckpoint(
        f"no checkpoint in {folder} is valid ({reasons}). Nothing was changed. Restore the files from a copy, or give "
        "another workdir to begin anew"
    )


def restore_params(
    folder: paths.PathLike, abstract_params: Tree, step: str | int = "last"
) -> tuple[int, Tree, dict[str, Any]]:
    """The `params` of a checkpoint, whatever mesh and optimizer wrote it, verified; the rest is not read.

    Args:
      folder: the run's checkpoint folder; it is only read, a run may be writing to it.
      abstract_params: tree of jax.ShapeDtypeStruct as saved; those without a sharding go to the default device.
      step: a step number, "last" (the newest valid one) or "best" (by the metric that the run kept the best of).

    Returns:
      (step, params, meta).

    Raises:
      ValueError: no such step, or params of other names, shapes or dtypes. InvalidCheckpoint: its files are damaged.
    """
    folder = _place(folder)
    restored = _first_valid(folder, matching_steps(folder, step), _params_of, {"params": abstract_params})
    return restored.step, restored.state["params"], restored.meta


def matching_steps(folder: paths.PathLike, step: str | int) -> list[int]:
    """The steps that a number, "last" or "best" means, in the order in which to try them; equal on all processes.

    Raises:
      ValueError: there is none.
    """
    folder = _place(folder)
    steps = list_steps(folder)
    if step == "last":
        chosen = steps[::-1]
    elif step == "best":
        chosen = _ranked(folder)[:1]
    else:
        chosen = [s for s in steps if str(s) == str(step)]
    if not (chosen := _agreed(chosen)):
        more = "; none carries the metric that says which is best: give a step or 'last'" if step == "best" else ""
        raise _missing_step(step, folder, steps, more)
    return chosen


def params_reader(
    folder: paths.PathLike, abstract_params: Tree, step: int, *, together: int = 1 << 29
) -> Callable[[tuple[str, ...]], jax.Array]:
    """What reads one leaf of a checkpoint's `params` by its path, verified, for weights that exceed the memory.

    Leaves that follow it are read with it, `together` bytes at most; those read before are let go.

    Raises:
      ValueError: params of other names, shapes or dtypes. InvalidCheckpoint (the reader raises it too): damaged files.
    """
    folder = _place(folder)
    record = _read_record(folder, step)
    wanted = _paths({"params": abstract_params})
    _check_structure(_params_of(record["leaves"]), wanted, f"checkpoint {step} in {folder}")
    order = list(wanted)
    held: dict[str, jax.Array] = {}

    def read(path: tuple[str, ...]) -> jax.Array:
        name = "/".join(("params", *path))
        if name not in held:
            held.clear()
            following = order[order.index(name) :]
            ends = itertools.accumulate(wanted[one].size * wanted[one].dtype.itemsize for one in following)
            n = max(1, sum(end <= together for end in ends))
            held.update(_read(folder, step, {one: wanted[one] for one in following[:n]}, record))
        return held[name]

    return read


def _params_of(saved: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf for path, leaf in saved.items() if path.split("/")[0] == "params"}


def _without(parts: Collection[str], saved: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf for path, leaf in saved.items() if path.split("/")[0] not in parts}


def _agreed(steps: list[int]) -> list[int]:
    """The first process's list of steps: a network disk may show the others an older one."""
    if jax.process_count() == 1:
        return steps
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array(steps or [0], np.int32), count)
    return [int(s) for s in multihost_utils.broadcast_one_to_all(padded)]


def _sync(name: str) -> None:
    """A barrier of all processes that needs no device."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        ocp.multihost.sync_global_processes(f"jaxalign:{name}")


def _remove(path: epath.Path) -> None:
    """Deletes a folder; a failure is a warning, because a run must not end over an old checkpoint."""
    try:
        (path / COMMITTED).unlink(missing_ok=True)  # half a checkpoint must not look like a whole one
        path.rmtree(missing_ok=True)
    except Exception as error:  # OSError, or one of gcsfs's own kinds
        log.warning("could not delete %s (%s); the run goes on, delete it by hand", path, error)


def _rename(path: epath.Path, target: epath.Path) -> None:
    """Renames a checkpoint's folder.

    In a bucket that is a copy and a deletion. Cut short, the copy is not committed yet, or the former one no more.
    """
    if paths.is_remote(path):
        paths.copy_folder(path, target, last=COMMITTED)
        _remove(path)
    else:
        path.rename(target)


def _free_name(path: epath.Path) -> epath.Path:
    """`path`, or `path`-2, -3, ...: the first that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


class Checkpoints:
    """The checkpoints of one run; the only writer of its folder. On several processes each call is made by all of them.

    Args:
      folder: made if it does not exist; what a killed run left half-written there is removed.
      keep: the newest `keep` steps stay.
      keep_best: beside them the best `keep_best` steps by `best_metric` stay (of those saved with it).
      best_metric: name in `save`'s `metrics`; None: there is no best.
      best_mode: "max" or "min": which value of it is best.
    """

    def __init__(
        self,
        folder: paths.PathLike,
        *,
        keep: int = 2,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "max",
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1: the newest checkpoint is what a run resumes from")
        if keep_best < 0:
            raise ValueError(f"keep_best is {keep_best}, expected 0 or more")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode is {best_mode!r}, expected 'max' or 'min'")
        self.folder = _place(folder)
        self.keep, self.keep_best, self.best_metric, self.best_mode = keep, keep_best, best_metric, best_mode
        self._own: set[int] = set()  # steps that this run saved or restored
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if jax.process_index() == 0:
            paths.make_folder(self.folder)
            self._clean()
        _sync("checkpoints_opened")

    @functools.cached_property
    def _writer(self) -> Any:
        """Orbax's checkpointer, made for the first save."""
        import orbax.checkpoint as ocp

        plain = ocp.PyTreeCheckpointHandler(use_compression=False)  # it would save 8% of the space for twice the time
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=plain, record=ocp.JsonCheckpointHandler()),
            async_options=ocp.options.AsyncOptions(timeout_secs=WRITE_TIMEOUT_S),
        )

    def _clean(self) -> None:
        """Removes what a killed process left behind. Only one process does this."""
        for path in sorted(_entries(self.folder)):  # a step comes before its former copy
            final = path.with_suffix("")
            if UNFINISHED in path.name or (path.name.isdigit() and not _is_committed(path)):
                log.warning("removing %s: its run was killed before this checkpoint was complete", path)
                _remove(path)
            elif path.suffix == REPLACED and not _is_committed(final):
                log.warning(
                    "checkpoint %s was being saved anew when its run was killed; its former copy is back", final
                )
                _rename(path, final)
            elif path.suffix in (DELETING, REPLACED):
                _remove(path)

    def steps(self) -> list[int]:
        """Steps that are on disk and committed, ascending."""
        return list_steps(self.folder)

    def best_steps(self) -> list[int]:
        """The committed steps that carry `best_metric`, best first."""
        return _ranked(self.folder, self.best_metric, self.best_mode) if self.best_metric else []

    def save(
        self,
        step: int,
        state: Tree,
        meta: dict[str, Any],
        *,
        metrics: dict[str, float] | None = None,
        force: bool = False,
    ) -> float:
        """Begins to save `state`; returns when it is copied off the devices and may be donated. Any thread may call it.

        Args:
          step: not below a step that is there. A step that this run saved or restored before is not written again ...
          state: pytree of arrays, PRNG keys and scalars; its weights are under `params` for `restore_params`.
          meta: what JSON can hold.
          metrics: values by name; `best_metric` among them makes this step a candidate for best.
          force: ... unless `force`, which replaces it (the former copy stays until the new one is committed).

        Returns:
          Seconds that the caller was held up: the wait for the save before, the checksums, the copy to the host.

        Raises:
          RuntimeError: the save before this one could not be written. ValueError: the folder holds this or a later step
          of another run, or a leaf is no array of numbers.
        """
        began = time.perf_counter()
        self.wait()
        again = step in self._own  # not read from the disk, which may look older to some of several processes
        newest = max(self.steps(), default=-1)
        if step < newest or (step == newest and not again):
            raise ValueError(
                f"{self.folder} already holds checkpoint {newest} and step {step} can't be saved there: "
                "restore first (restore(step=...) puts later steps aside), or use another workdir"
            )
        if again and not force:
            return time.perf_counter() - began
        import orbax.checkpoint as ocp

        arrays, sums = _raw_leaves(state), checksums(state)
        leaves = {}
        for path, leaf in _paths(state).items():
            leaves[path] = _describe(leaf) | {"checksum": sums[path]}
            if _is_key(leaf):
                leaves[path]["key_impl"] = str(jax.random.key_impl(leaf))
        values = {name: float(value) for name, value in (metrics or {}).items()}
        best = {"best_metric": self.best_metric, "best_mode": self.best_mode}
        record = json.dumps({"step": step, "meta": meta, "metrics": values, **best, "leaves": leaves})
        target = self.folder / str(step)
        if again and jax.process_index() == 0:
            _rename(target, target.with_suffix(REPLACED))
        _sync("replaced")
        wrapped = {"record": record, "crc32": zlib.crc32(record.encode())}
        try:
            self._writer.save(
                target, ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(wrapped))
            )
        except Exception as error:  # each file system has kinds of its own
            raise self._failure(step, error) from error
        self._own.add(step)
        held = time.perf_counter() - began
        self._pending = step, self._worker.submit(self._finish, step, began, held)
        return held

    def _finish(self, step: int, began: float, held: float) -> None:
        """In the worker thread: waits for the commit, then deletes what need not be kept."""
        self._writer.wait_until_finished()
        seconds = time.perf_counter() - began
        log.info("checkpoint %d saved in %.2f s, of which the run waited %.2f s", step, seconds, held)
        if jax.process_index() == 0:
            try:
                self._retire(step)
            except Exception as error:  # each file system has kinds of its own
                log.warning("could not look for old checkpoints in %s (%s); the run goes on", self.folder, error)

    def _retire(self, step: int) -> None:
        """Deletes what need not be kept once `step` is committed.

        By a rename first, on a disk: a deletion cut short must not leave half a checkpoint that looks like a whole one.
        """
        replaced = self.folder / f"{step}{REPLACED}"
        if replaced.exists():
            _remove(replaced)
        steps = self.steps()
        for old in set(steps) - set(steps[-self.keep :]) - set(self.best_steps()[: self.keep_best]):
            doomed = self.folder / str(old)
            try:
                if not paths.is_remote(doomed):
                    doomed = doomed.rename(self.folder / f"{old}{DELETING}")
            except OSError as error:
                log.warning("could not delete checkpoint %d (%s); the run goes on, delete it by hand", old, error)
            else:
                _remove(doomed)

    def _failure(self, step: int, error: BaseException) -> RuntimeError:
        good = max(self.steps(), default=None)
        return RuntimeError(
            f"checkpoint {step} could not be written to {self.folder}: {type(error).__name__}: {error}. "
            f"{'No checkpoint is there' if good is None else f'Checkpoint {good} is the newest'}; "
            "see to the space and the rights there and start the same command again"
        )

    def wait(self) -> None:
        """Returns when the save under way is committed and old steps are gone; RuntimeError if the write failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:  # whatever stopped the writer, the run must not go on as if it had saved
            self._own.discard(step)
            raise self._failure(step, error) from error

    def close(self) -> None:
        """As `wait`, then ends the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            if "_writer" in self.__dict__:
                self._writer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(
        self, abstract_state: Tree, step: int | None = None, *, ignore: Collection[str] = ()
    ) -> Restored | None:
        """The newest valid checkpoint (or `step`'s), verified, on the shardings of `abstract_state`; None without any.

        An invalid step is named in a warning with its reason, and the next older one is taken. Steps after the restored
        one are renamed to `<step>.aside`, so that what the run saves from here on never mixes with them; they may be
        deleted by hand.

        Args:
          abstract_state: tree like the saved one with jax.ShapeDtypeStruct leaves (or arrays, scalars), on any mesh.
          step: None, or a step that must be there and valid.
          ignore: parts of what was saved, by their names in the tree, that are not wanted.

        Returns:
          (step, state, meta), or None if there is no checkpoint at all.

        Raises:
          InvalidCheckpoint: checkpoints are there, none (or not the given one) is valid. ValueError: no such step, or
          the state has other leaves, shapes or dtypes than the saved one.
        """
        self.wait()
        steps = _agreed(self.steps())
        if step is not None and step not in steps:
            raise _missing_step(step, self.folder, steps)
        if not steps:
            return None
        candidates = steps[::-1] if step is None else [step]
        wanted = functools.partial(_without, ignore)
        restored = _first_valid(self.folder, candidates, wanted, abstract_state)
        self._own = {restored.step}
        if jax.process_index() == 0:
            for later in [s for s in steps if s > restored.step]:
                target = _free_name(self.folder / f"{later}{ASIDE}")
                _rename(self.folder / str(later), target)
                log.warning(
                    "checkpoint %d lies after the restored %d and was put aside as %s", later, restored.step, target
                )
        _sync("put_aside")
        return restored
