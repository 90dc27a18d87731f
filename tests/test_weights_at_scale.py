"""Weights of models that no process holds whole: read by byte range, written together, in bounded memory."""

import json
import os
from pathlib import Path
from typing import Any

import buckets
import jax
import numpy as np
import pytest
from common import policy
from processes import two_processes

from jaxalign import gather, hf, models, paths, safetensors_file, sharding
from jaxalign.safetensors_file import INDEX


@pytest.fixture(scope="module")
def server():
    with buckets.Server() as server:
        os.environ.update(server.environment)
        yield server


@pytest.fixture
def bucket(server):
    name = f"weights-{len(server.buckets)}"
    server.buckets[name] = buckets.Bucket(name)
    return server.buckets[name]


@pytest.fixture
def root(bucket):
    return paths.at(f"gs://{bucket.name}")


def content(folder: Any) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def equal(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(same))


LAYOUTS = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2})
MANY_FILES = 50_000

LOAD_AND_SAVE = """
source, out, layouts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
_, whole = hf.load(source)
read_range = paths.read_range
for number, layout in enumerate(layouts):
    seen = []
    paths.read_range = lambda path, offset, size: seen.append((offset, size)) or read_range(path, offset, size)
    mesh, cfg, params = load(source, layout)
    paths.read_range = read_range
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        for shard in ours.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(theirs)[shard.index])
    with sharding.use_mesh(mesh):
        for dtype in ("float32", "bfloat16"):
            target = f"{out}/{number}-{dtype}"
            hf.save(target, cfg, params, tokenizer_from=source, dtype=dtype, max_shard_bytes=int(sys.argv[4]))
    tell(seen)
"""


@pytest.mark.slow
def test_two_processes_read_only_their_rows_and_write_what_one_does(root, tmp_path):
    source = policy("llama")
    cfg, params = hf.load(source)
    found = two_processes(LOAD_AND_SAVE, tmp_path, source, root / "out", json.dumps(LAYOUTS), MANY_FILES)
    for number in range(len(LAYOUTS)):
        for dtype in ("float32", "bfloat16"):
            one = tmp_path / f"{number}-{dtype}"
            hf.save(one, cfg, params, tokenizer_from=source, dtype=dtype, max_shard_bytes=MANY_FILES)
            assert content(root / "out" / one.name) == content(one)
            assert len(list(one.glob("*.safetensors"))) > 3
    header = safetensors_file.read_header(source / "model.safetensors")
    for number, layout in enumerate(LAYOUTS):
        shares = {name: [share_read(tensor, seen[number]) for seen in found] for name, tensor in header.items()}
        # Rows in the file are the outputs. fsdp is over the rows of down_proj, o_proj and the tables, and over the
        # columns of the others; tensor is within a process in these layouts, and so are replicas.
        split = {"model.embed_tokens.weight", "lm_head.weight"}
        split |= {name for name in header if "o_proj" in name or "down_proj" in name}
        for name, share in shares.items():
            rows = 0.5 if name in split and layout.get("data", 1) == 1 else 1.0
            assert share == [rows, rows], (layout, name)


def share_read(tensor: safetensors_file.Tensor, ranges: list[list[int]]) -> float:
    """The share of a tensor's bytes that was read; no byte may be read twice."""
    size = 4 * int(np.prod(tensor.shape))
    times = np.zeros(size, int)
    for offset, length in ranges:
        start = offset - tensor.offset
        if 0 <= start < size:
            times[start : start + length] += 1
    assert times.max() == 1
    return times.mean()


def test_a_model_is_read_and_written_in_blocks_of_any_size(tmp_path, monkeypatch):
    cfg, params = hf.load(policy("qwen2"))
    hf.save(tmp_path / "whole", cfg, params)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(mesh, models.declare(cfg))
    for size in (1, 100, 1000, 77_777):  # of bytes: less than a row, some rows, several tensors
        monkeypatch.setattr(gather, "BLOCK_BYTES", size)
        monkeypatch.setattr(safetensors_file, "READ_BYTES", size)
        _, parts = hf.load(policy("qwen2"), shardings=shardings)
        assert equal(parts, params)
        hf.save(tmp_path / "out", cfg, parts)
        assert content(tmp_path / "out") == content(tmp_path / "whole")
    hf.save(tmp_path / "host", cfg, jax.tree.map(np.asarray, params))
    assert content(tmp_path / "host") == content(tmp_path / "whole")


def test_rows_that_several_parts_want_are_read_once():
    ranges = safetensors_file.row_ranges((100, 2), [(10, 40), (0, 20), (10, 40), (60, 61)])
    assert ranges == [(0, 20), (20, 40), (60, 61)]


# In a bucket


def test_a_model_in_a_bucket_is_the_one_on_disk(bucket, root, tmp_path):
    cfg, params = hf.load(policy("llama"))
    for folder in (tmp_path / "m", root / "m"):
        hf.save(folder, cfg, params, tokenizer_from=policy("llama"), max_shard_bytes=MANY_FILES)
    assert content(root / "m") == content(tmp_path / "m")
    assert hf.fingerprint(root / "m") == hf.fingerprint(tmp_path / "m")
    assert hf.fingerprint(root / "m", whole_below=1000) == hf.fingerprint(tmp_path / "m", whole_below=1000)
    again_cfg, again = hf.load(root / "m")
    assert again_cfg == cfg and equal(again, params)
    ours, theirs = hf.load_tokenizer(root / "m"), hf.load_tokenizer(policy("llama"))
    assert ours.encode("Hello 42") == theirs.encode("Hello 42") and ours.chat_template == theirs.chat_template
    hf.save(tmp_path / "copy", cfg, params, tokenizer_from=root / "m", max_shard_bytes=MANY_FILES)
    assert content(tmp_path / "copy") == content(tmp_path / "m")


def test_whatever_moment_a_save_to_a_bucket_ends_at_there_is_a_whole_model_or_none(bucket, root, tmp_path):
    cfg, params = hf.load(policy("llama"))
    doubled = jax.tree.map(lambda x: 2 * x, params)
    for number, (weights, size) in enumerate(((params, 10**9), (doubled, MANY_FILES), (params, MANY_FILES))):
        hf.save(root / "m", cfg, weights, max_shard_bytes=size)
        hf.save(tmp_path / str(number), cfg, weights, max_shard_bytes=size)
    whole = [content(tmp_path / str(number)) for number in range(3)]
    for there in bucket.history:
        found = {name.removeprefix("m/"): one.content for name, one in there.items()}
        assert "config.json" not in found or found in whole or set(found) == {"config.json"}
    with pytest.raises(ValueError, match="not installed"):
        hf.save(root / "m", cfg, params, tokenizer_from="package:no_such_package")
    assert content(root / "m") == whole[2]
    paths.replace(root / "thesis" / "thesis.txt", b"precious")
    with pytest.raises(ValueError, match="no model folder"):
        hf.save(root / "thesis", cfg, params)
    bucket.objects = {name: one for name, one in bucket.objects.items() if name != "m/config.json"}
    with pytest.raises(ValueError, match="there is no gs://.*config.json"):
        hf.load(root / "m")
    hf.save(root / "m", cfg, params)  # what a killed save left is replaced
    assert equal(hf.load(root / "m")[1], params)


# Memory

QWEN_05B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu",
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip

MEASURE = """
from jax.experimental import multihost_utils

def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1e6  # GB

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew at what is resident now
    result = work()
    return memory("VmHWM"), result

source, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
multihost_utils.sync_global_devices("imports and connections come before")
before = memory("VmRSS")
loading, (mesh, cfg, params) = peak(lambda: load(source, {"fsdp": 2}))
share = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards) / 1e9
saving, _ = peak(lambda: hf.save(out, cfg, params, max_shard_bytes=size))
tell({"share": share, "loading": loading - before, "saving": saving - before})
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
def test_two_processes_hold_their_share_of_two_gigabytes_and_half_a_gigabyte_more(tmp_path):
    source, out, size = tmp_path / "random", tmp_path / "out", 500_000_000
    write_random(source, size)
    found = two_processes(MEASURE, tmp_path, source, out, size, devices=1)
    print(found)
    for ((process),) in found:
        assert 0.95 < process["share"] < 1.05
        assert process["loading"] < process["share"] + 0.5 and process["saving"] < process["share"] + 0.5
    for file in source.glob("*.safetensors*"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert (source / INDEX).exists()


def write_random(folder: Path, max_shard_bytes: int) -> None:
    """A folder with a random model of 2 GB, in the files that `hf.save` would choose."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_05B))
    shapes = {name: leaf.tensor_shape for leaf in hf.names.leaves(hf.read_config(folder)) for name in leaf.names}
    random, dtype = np.random.default_rng(0), np.dtype(np.float32)
    shards = safetensors_file.plan(shapes, dtype, max_shard_bytes)
    for shard in shards:
        blocks = ((name, random.standard_normal(shape, dtype)) for name, shape in shard.shapes.items())
        safetensors_file.write(folder, shard, dtype, blocks)
    safetensors_file.write_index(folder, shards, dtype)
