"""jaxalign.checkpoint: what is saved comes back bit for bit on any mesh, what was damaged is found, the best stays."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import checkpoint
from jaxalign.checkpoint import Checkpoints, InvalidCheckpoint, checksums, read_meta, restore_params


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    aux: Any


def params_of(scale: float = 1.0) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "embed_tokens": {"embedding": scale * jax.random.normal(keys[0], (32, 16))},
        "layers": {"mlp": {"kernel": scale * jax.random.normal(keys[1], (2, 16, 8))}},
        "norm": {"scale": jax.random.normal(keys[2], (16,), jnp.bfloat16)},
    }


def make_state(step: int = 0, scale: float = 1.0) -> State:
    """Masked Adam, a PRNG key, a flag, a host array and Python scalars: every kind of leaf and of empty node."""
    params = params_of(scale)
    decayed = {"embed_tokens": True, "layers": True, "norm": False}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), decayed), optax.add_decayed_weights(0.0, decayed)
    )
    aux = {
        "key": jax.random.key(7),
        "halted": jnp.array(False),
        "mean": np.float64(0.5),
        "rows": np.arange(5),
        "tries": 3,
    }
    return State(jnp.int32(step), params, tx.init(params), aux)


def as_numpy(tree: Any) -> list[np.ndarray]:
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if checkpoint._is_key(x) else x, tree)
    return [np.asarray(x) for x in jax.tree.leaves(raw)]


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(as_numpy(a), as_numpy(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def placed(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Leaves whose first axis divides are sharded by `spec`, all others replicated; scalars and host arrays stay."""

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        ways = int(np.prod([mesh.shape[name] for name in jax.tree.leaves(tuple(spec))]))
        fits = x.ndim and x.shape[-1] % ways == 0
        return jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), *spec) if fits else P()))

    return jax.tree.map(place, tree)


def abstract(tree: Any) -> Any:
    def one(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(one, tree)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), names)


def data_files(step_folder: Path) -> list[Path]:
    return [
        p for p in sorted((step_folder / "state").rglob("*")) if p.is_file() and "/d/" in str(p) and p.stat().st_size
    ]


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state, meta = make_state(4), {"config": {"lr": 1e-4, "name": "ü"}, "fingerprint": "ab12", "list": [1, None]}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        assert checkpoints.save(4, state, meta) >= 0
        checkpoints.wait()
        step, restored, found = checkpoints.restore(abstract(state))
    assert step == 4 and found == meta == read_meta(tmp_path, 4)
    assert_same_bits(restored, state)
    assert type(restored.aux["tries"]) is int and isinstance(restored.aux["rows"], np.ndarray)
    assert jax.random.key_impl(restored.aux["key"]) == jax.random.key_impl(state.aux["key"])


@pytest.mark.parametrize("direction", ["shard differently", "one device", "from one device"])
def test_restore_on_another_mesh_is_bit_equal_and_its_checksums_are(tmp_path, direction):
    fsdp = placed(make_state(1), mesh_of((8,), ("fsdp",)), P("fsdp"))
    mixed = placed(make_state(0, 0.0), mesh_of((2, 4), ("data", "fsdp")), P("fsdp"))
    single = make_state(1)
    source, target = {
        "shard differently": (fsdp, mixed),
        "one device": (fsdp, single),
        "from one device": (single, mixed),
    }[direction]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, source, {})
        restored = checkpoints.restore(abstract(target)).state
    assert_same_bits(restored, source)
    for new, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        if isinstance(want, jax.Array):
            assert new.sharding.is_equivalent_to(want.sharding, want.ndim)
    assert checksums(restored) == checksums(source) == checksums(jax.tree.map(lambda x: x, single))


def test_it_works_under_a_mesh_in_context_with_leaves_placed_here_and_there(tmp_path):
    mesh = mesh_of((8,), ("fsdp",))
    with jax.set_mesh(mesh):
        state = {
            "params": {"w": jax.device_put(jnp.arange(64.0), NamedSharding(mesh, P("fsdp")))},
            "uncommitted": jnp.float32(2.0),
            "elsewhere": jax.device_put(jnp.arange(3), jax.devices()[3]),
            "host": np.arange(3),
        }
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            restored = checkpoints.restore(abstract(state)).state
        assert_same_bits(restored, state)
        assert restored["elsewhere"].sharding == state["elsewhere"].sharding


def test_checksum_finds_every_single_flipped_bit_moved_values_and_even_sign_flips():
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    reference = checksums({"x": x})["x"]
    assert reference == checksums({"x": jnp.asarray(x)})["x"]
    for bit in range(x.nbytes * 8):
        damaged = bytearray(x.tobytes())
        damaged[bit // 8] ^= 1 << bit % 8
        assert checksums({"x": np.frombuffer(damaged, np.float32).reshape(4, 8)})["x"] != reference
    for other in (-x, x[::-1], x.T.copy().reshape(4, 8), np.roll(x, 1)):
        assert checksums({"x": np.ascontiguousarray(other)})["x"] != reference


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "float16", "bfloat16", "float32", "int64", "float64"]
)
def test_checksum_of_a_dtype_is_the_same_on_device_and_host(dtype):
    x = np.asarray(jnp.asarray(np.arange(24).reshape(2, 3, 4) % 3, "bfloat16" if dtype == "bfloat16" else None)).astype(
        dtype
    )
    with jax.enable_x64(True):
        assert checksums({"x": x}) == checksums({"x": jnp.asarray(x)})


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": {"w": jnp.arange(300_000.0)}}
    before = np.array(state["params"]["w"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(20):
            state = advance(state)
        restored = checkpoints.restore(abstract(state)).state
    np.testing.assert_array_equal(restored["params"]["w"], before)


def test_one_flipped_bit_in_the_array_file_is_found_and_the_run_falls_back(tmp_path, caplog):
    older, newer = ({"params": {"w": jax.random.normal(jax.random.key(n), (64, 256))}} for n in (1, 2))
    rng = random.Random(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, older, {"n": 1})
        checkpoints.save(2, newer, {"n": 2})
        checkpoints.wait()
        file = max(data_files(tmp_path / "2"), key=lambda f: f.stat().st_size)
        good = file.read_bytes()
        for _ in range(6):
            bad = bytearray(good)
            bad[rng.randrange(100, 50_000)] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            caplog.clear()
            step, state, meta = checkpoints.restore(abstract(newer))
            assert step == 1 and meta == {"n": 1}
            assert_same_bits(state, older)
            assert (
                "checkpoint 2" in caplog.text
                and "INVALID" in caplog.text
                and "falling back to checkpoint 1" in caplog.text
            )
            assert checkpoints.steps() == [1]
            (tmp_path / "2.aside").rename(tmp_path / "2")
        with pytest.raises(InvalidCheckpoint, match="no checkpoint in .* is valid .*2: its arrays|other bits"):
            checkpoints.restore(abstract(newer), step=2)
        with pytest.raises(InvalidCheckpoint):
            restore_params(tmp_path, abstract(newer)["params"], 2)
        assert restore_params(tmp_path, abstract(newer)["params"])[0] == 1
        file.write_bytes(good)
        assert checkpoints.restore(abstract(newer)).step == 2


def truncate(step: Path) -> None:
    file = max(data_files(step), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(step: Path) -> None:
    max(data_files(step), key=lambda f: f.stat().st_size).write_bytes(b"")


def lose_file(step: Path) -> None:
    max(data_files(step), key=lambda f: f.stat().st_size).unlink()


def lose_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def lose_record(step: Path) -> None:
    (step / "record" / "metadata").unlink()


def alter_record(step: Path) -> None:
    file = step / "record" / "metadata"
    file.write_text(file.read_text().replace("0.5", "0.6"))


def rename_leaf(step: Path) -> None:
    file = step / "state" / "_METADATA"
    file.write_text(file.read_text().replace("norm/scale", "norm/scald"))


@pytest.mark.parametrize("damage", [truncate, empty, lose_file, lose_state, lose_record, alter_record, rename_leaf])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(tmp_path, caplog, damage):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"lr": 0.5})
        checkpoints.save(2, make_state(2, 2.0), {"lr": 0.5})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)).step == 1
        assert "checkpoint 2" in caplog.text and "INVALID" in caplog.text
        assert (tmp_path / "2.aside").is_dir() and checkpoints.steps()[-1] == 1
        assert checkpoints.save(2, make_state(2, 2.0), {}) > 0
        assert checkpoints.restore(abstract(state)).step == 2


def test_when_none_is_valid_it_is_an_error_and_nothing_is_moved(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        empty(tmp_path / "1")
        with pytest.raises(InvalidCheckpoint, match="no checkpoint in .* is valid"):
            checkpoints.restore(abstract(state))
        assert checkpoints.steps() == [1]
        with pytest.raises(ValueError, match=r"no checkpoint 7 in .*steps there: 1"):
            checkpoints.restore(abstract(state), step=7)


def test_an_earlier_step_can_be_chosen_and_later_ones_are_put_aside_every_time(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"n": step})
        assert checkpoints.restore(abstract(state), step=1).meta == {"n": 1}
        checkpoints.save(2, state, {"n": "again"})
        assert checkpoints.restore(abstract(state), step=1).step == 1
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2.aside", "2.aside-2", "3.aside"}


def test_another_state_is_an_error_that_names_the_leaves_and_never_a_fallback(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        other = abstract(state)._replace(aux={"new": jnp.zeros(3)}, step=jax.ShapeDtypeStruct((2,), jnp.int32))
        with pytest.raises(
            ValueError, match=r"1 not in the checkpoint: aux/new; .*aux/halted.*step is int32\[\], expected int32\[2\]"
        ):
            checkpoints.restore(other)
        with pytest.raises(ValueError, match="of type <U3; a checkpoint holds numbers"):
            checkpoints.save(2, {"params": {}, "name": "abc"}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(2, state, {"path": object()})
        assert checkpoints.steps() == [1]


def test_params_alone_come_back_on_one_device_whatever_mesh_wrote_them(tmp_path):
    states = {n: placed(make_state(n, float(n)), mesh_of((8,), ("fsdp",)), P("fsdp")) for n in (1, 2, 3)}
    with Checkpoints(tmp_path, best_metric="eval_loss", best_mode="min") as checkpoints:
        for step, loss in zip((1, 2, 3), (0.5, 0.2, 0.3), strict=True):
            checkpoints.save(step, states[step], {"n": step}, metrics={"eval_loss": loss})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[1].params)
    for asked, step in (("last", 3), ("best", 2), (2, 2), ("3", 3)):
        found, params, meta = restore_params(tmp_path, shapes, asked)
        assert found == step and meta == {"n": step}
        assert_same_bits(params, jax.device_get(states[step].params))
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(params)} == {1}
    with pytest.raises(ValueError, match="no checkpoint 1 in"):
        restore_params(tmp_path, shapes, 1)
    with pytest.raises(ValueError, match="there is none"):
        restore_params(tmp_path / "nowhere", shapes)


def test_the_newest_and_the_best_are_both_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: float("nan"), 5: None, 6: 0.3, 7: 0.9, 8: 0.1}
    expected_best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: 7, 8: 7}
    state = {"params": {"w": jnp.ones(4)}}
    with Checkpoints(tmp_path, keep=2, keep_best=1, best_metric="score") as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state, {}, metrics=None if score is None else {"score": score})
            checkpoints.wait()
            assert checkpoints.best_steps()[0] == expected_best[step]
            assert set(checkpoints.steps()) == {step, max(1, step - 1), expected_best[step]}
        assert checkpoints.steps()[-1] == 8
    with Checkpoints(tmp_path, keep=1, keep_best=2, best_metric="score", best_mode="min") as checkpoints:
        assert checkpoints.restore(abstract(state)).step == 8
        checkpoints.save(9, state, {}, metrics={"score": 0.5})
        checkpoints.wait()
        assert checkpoints.steps() == [8, 9] or checkpoints.steps() == [7, 8, 9]
        assert checkpoints.best_steps()[0] == 8


def test_an_old_step_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    rmtree, rename = shutil.rmtree, os.rename

    def refuse(path, *args, **kwargs):
        if Path(path).name == "1.deleting":
            raise PermissionError(f"not allowed: {path}")
        rmtree(path, *args, **kwargs)

    def refuse_rename(path, target, **kwargs):
        if Path(target).name == "2.deleting":
            raise PermissionError(f"not allowed: {path}")
        rename(path, target, **kwargs)

    state = {"params": {"w": jnp.ones(4)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(shutil, "rmtree", refuse)
        monkeypatch.setattr(os, "rename", refuse_rename)
        for step in (1, 2, 3):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3] and caplog.text.count("could not delete") == 2
        monkeypatch.undo()
        checkpoints.save(4, state, {})
    Checkpoints(tmp_path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["4"]


def test_an_asynchronous_write_that_fails_fails_the_run(tmp_path):
    """The disk takes no file over 64 KiB, which the writer learns after `save` has returned."""
    small, big = ({"params": {"w": jax.random.normal(jax.random.key(0), (n,))}} for n in (4, 200_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small, {})
        checkpoints.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
            for step, find_out in (
                (2, checkpoints.wait),
                (3, lambda: checkpoints.save(4, small, {})),
                (5, checkpoints.close),
            ):
                checkpoints.save(step, big, {})
                with pytest.raises(
                    RuntimeError, match=f"checkpoint {step} could not be written.*Checkpoint 1 is the newest"
                ):
                    find_out()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(small)).step == 1
        assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_step_of_another_run_is_never_skipped_over_or_overwritten(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {"run": "first"})
        checkpoints.wait()
        before = (tmp_path / "5" / "record" / "metadata").stat().st_mtime_ns
        checkpoints.save(5, state, {"run": "first"})
        assert (tmp_path / "5" / "record" / "metadata").stat().st_mtime_ns == before
        checkpoints.save(5, state, {"run": "first", "evaluated": True}, force=True)
        checkpoints.wait()
        assert read_meta(tmp_path, 5) == {"run": "first", "evaluated": True}
    assert [p.name for p in tmp_path.iterdir()] == ["5"]
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 3):
            with pytest.raises(ValueError, match="already holds checkpoint 5.*restore first"):
                checkpoints.save(step, state, {"run": "second"}, force=True)
        (tmp_path / "5").rename(tmp_path / "5.replaced")  # as if killed while it was saved anew
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)).meta["evaluated"]


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    for wrong in ({"keep": 0}, {"keep_best": -1}, {"best_mode": "biggest"}):
        with pytest.raises(ValueError, match="expected"):
            Checkpoints(tmp_path, **wrong)
    with pytest.raises(ValueError, match="two leaves"):
        checksums({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


SAVER = """
import sys, jax, jax.numpy as jnp
from jaxalign.checkpoint import Checkpoints
def state(n): return {"params": {"w": jnp.full((3, 40_000), n, jnp.float32) * jnp.arange(40_000)}, "step": jnp.int32(n)}
checkpoints = Checkpoints(sys.argv[1])
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
found = checkpoints.restore(abstract)
step = 0 if found is None else found.step
if found:
    assert found.meta == {"n": step} and (found.state["params"]["w"] == state(step)["params"]["w"]).all()
print("restored", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, state(step), {"n": step})
    checkpoints.wait()
    print("committed", step, flush=True)
"""


@pytest.mark.slow
def test_after_kill_9_during_saves_the_next_start_finds_the_last_committed_step(tmp_path):
    rng = random.Random(1)
    committed, left_unfinished = 0, 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        restored = int(process.stdout.readline().split()[1])
        assert committed <= restored <= committed + 1
        committed = int(process.stdout.readline().split()[1])  # from here on it does nothing but save
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].split()
        committed = max([committed, *map(int, output[1::2])])
        left_unfinished += any("tmp" in p.name for p in tmp_path.iterdir())
    assert left_unfinished
    Checkpoints(tmp_path).close()
    assert all(p.name.isdigit() for p in tmp_path.iterdir())


PROCESS = """
import os, sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxalign.checkpoint import Checkpoints, checksums, read_meta
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
whole = {"params": {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}, "step": np.int32(1)}
def place(x, spec): return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])
sharded = {"w": place(whole["params"]["w"], P("fsdp"))}
state = {"params": sharded, "step": place(whole["step"], P()), "local": jnp.ones(3)}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
abstract["params"]["w"] = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
with Checkpoints(sys.argv[3], keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"n": step})
    checkpoints.save(3, state, {"n": 3, "again": True}, force=True)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3] and read_meta(sys.argv[3], 3) == {"n": 3, "again": True}
    damaged = os.path.join(sys.argv[3], "3")
    if jax.process_index() == 0:
        for folder, _, names in os.walk(damaged):
            for name in names:
                if folder.endswith("/d"):
                    open(os.path.join(folder, name), "wb").close()
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    found = checkpoints.restore(abstract)
    sums = checksums(state)
    assert checksums(found.state) == sums
    for shard in found.state["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole["params"]["w"][shard.index])
    print("RESULT", found.step, found.meta, sums, flush=True)
jax.distributed.shutdown()
"""


def test_two_processes_write_one_checkpoint_and_fall_back_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", PROCESS, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(n), str(tmp_path)], env={**os.environ, **flags}, **pipes) for n in (0, 1)]
    outputs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    lines = [[line for line in out.splitlines() if "RESULT" in line] for out, _ in outputs]
    assert lines[0] == lines[1]
    whole = {
        "params": {"w": np.arange(64, dtype=np.float32).reshape(8, 8)},
        "step": np.int32(1),
        "local": np.ones(3, np.float32),
    }
    assert lines[0] == [f"RESULT 2 {{'n': 2}} {checksums(whole)}"]
