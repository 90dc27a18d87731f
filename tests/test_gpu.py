"""On a GPU: the CPU tests' numbers, cuDNN's attention inside the model, and runs that repeat bit for bit.

Run by `pytest -m gpu`. In float32 XLA multiplies in TF32 on NVIDIA's recent GPUs unless it is told otherwise; where
numbers of the CPU are compared, it is.
"""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import runs
from common import FAMILIES, GRADIENT_NORM, LOGPS, LOSS, SEQUENCE_LOGPS, case, model, pair_batch, positions

from jaxalign import logprobs, metrics, models, objectives, reference, sampling, step
from jaxalign.models import attention

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent


@pytest.fixture
def exact():
    """Float32 products in float32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("family", (*FAMILIES, "llama_rope3"))
def test_logits_equal_transformers(family, exact):
    cfg, params = model(family)
    _, a = case(family, "forward_padded")
    tokens, real = a["in.right.input_ids"], a["in.right.attention_mask"]

    @jax.jit
    def logits(params):
        hidden, _ = models.apply(cfg, params, tokens, positions(tokens))
        return models.unembed(cfg, params, hidden)

    np.testing.assert_allclose(np.asarray(logits(params)) * real[..., None], a["out.right.logits"], **LOGPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_loss_and_gradients_equal_trl(family, exact):
    golden, a = case(family, "dpo_sigmoid")
    cfg, params = model(family)
    batch = pair_batch(a)
    ref_cfg, ref_params = model(family, "ref")
    batch["ref_logps"] = np.asarray(jax.jit(reference.make_score(ref_cfg))(ref_params, batch))
    objective = objectives.pairwise(cfg, "sigmoid", beta=golden["effective_config"]["beta"])
    gradients_of = jax.jit(step.make_gradients(objective))
    loss, found, gradients = jax.device_get(gradients_of(params, None, batch, {}))
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    values = metrics.reduce(found)
    for name in ("logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(values[name], golden["metrics"][name], **SEQUENCE_LOGPS)
    np.testing.assert_allclose(optax.tree.norm(gradients), golden["grad_global_norm"], **GRADIENT_NORM)
    for name, got in (
        ("model.norm.weight", gradients["norm"]["scale"]),
        ("model.layers.1.self_attn.k_proj.weight[:4]", gradients["layers"]["self_attn"]["k_proj"]["kernel"][1].T[:4]),
    ):
        want = a[f"out.grad.{name}"]
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_equal_transformers(family, exact):
    cfg, params = model(family)
    _, a = case(family, "greedy")
    prompts = [ids[mask == 1] for ids, mask in zip(a["in.input_ids"], a["in.attention_mask"], strict=True)]
    keys, limits = sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=32)
    samples = sampling.sample(cfg, params, prompts, keys, limits, max_new_tokens=32)
    np.testing.assert_array_equal(samples.tokens, a["out.new_tokens"])
    np.testing.assert_allclose(samples.logps, a["out.new_token_logps"], atol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["right padding", "packed"])
@pytest.mark.parametrize("windows", [(None, None, None), (20, 20, 20), (None, 20, None)], ids=str)
def test_a_model_with_cudnns_attention_is_as_near_to_float32_as_with_xlas(windows, packed):
    """Log-probs and gradients, with grouped queries and recomputed layers."""
    cfg = models.config_from_hf(
        dict(model_type="qwen2", vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
             num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
             tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.1)
    )  # fmt: skip
    cfg = dataclasses.replace(cfg, sliding_windows=windows, remat="full")
    time = 128
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, cfg.vocab_size, (2, time), dtype=np.int32)
    real = np.arange(time) < np.array([[time], [90]])
    batch = {"tokens": tokens, "positions": positions(tokens), "mask": real & (np.arange(time) >= 7)}
    if packed:
        batch["segment_ids"] = np.where(real, 1 + (np.arange(time) >= 40), 0).astype(np.int32)
        batch["positions"] = np.where(np.arange(time) >= 40, batch["positions"] - 40, batch["positions"])
    weight = rng.normal(size=tokens.shape).astype(np.float32)
    params = jax.jit(models.init, static_argnums=0)(cfg, jax.random.key(0))

    def found(kernel, dtype):
        run = dataclasses.replace(cfg, attention=kernel, compute_dtype=dtype)

        def loss(params):
            logps = logprobs.score(run, params, batch)["logps"]
            return (logps * weight).sum(), logps

        (_, logps), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return [np.asarray(x, np.float64) for x in (logps, *jax.tree.leaves(gradients))]

    with jax.default_matmul_precision("highest"):
        truth = found("xla", "float32")
    assert attention.choose(dataclasses.replace(cfg, compute_dtype="bfloat16"))[0] == "cudnn"
    for want, xla, cudnn in zip(truth, found("xla", "bfloat16"), found("cudnn", "bfloat16"), strict=True):
        size = np.linalg.norm(want)
        far, ours = np.linalg.norm(xla - want) / size, np.linalg.norm(cudnn - want) / size
        assert ours < 0.1 and ours < 2 * far + 1e-3, f"shape {want.shape}: cuDNN {ours:.2g}, XLA {far:.2g}"


def test_a_bfloat16_run_begins_near_ln_2(tmp_path):
    folder = runs.run(tmp_path / "run", steps=3, epochs=None, model__compute_dtype="bfloat16").folder
    lines = [line for line in runs.lines(folder) if "loss" in line]
    # Policy and reference are scored by two programs, whose roundings may differ.
    assert abs(lines[0]["loss"] - math.log(2)) < 3e-2 and lines[0]["ref_logps_difference/max"] < 0.5
    assert all(math.isfinite(x) for line in lines for x in line.values())


def test_three_steps_equal_those_of_the_cpu(tmp_path, exact):
    changes = {"steps": 3, "epochs": None, "model__compute_dtype": "float32"}
    gpu = runs.run(tmp_path / "gpu", **changes).folder
    command = [sys.executable, "-m", "jaxalign.train", f"--config={runs.save(tmp_path / 'cpu', **changes)}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    both = zip(runs.lines(gpu), runs.lines(tmp_path / "cpu"), strict=True)
    pairs = [(ours, theirs) for ours, theirs in both if "loss" in ours]
    assert [ours["step"] for ours, _ in pairs] == [1, 2, 3]
    for ours, theirs in pairs:
        # The first update has the learning rate 0. After the second, Adam has divided gradients by their own size, so
        # that what was rounding in the smallest of them is of the size of an update.
        loose = {"rtol": 2e-2, "atol": 5e-3}
        tolerances = {"loss": LOSS, "grad_norm": GRADIENT_NORM, "logps/chosen": SEQUENCE_LOGPS,
                      "logps/rejected": SEQUENCE_LOGPS}  # fmt: skip
        for name, tight in tolerances.items():
            tolerance = tight if ours["step"] < 3 else loose
            np.testing.assert_allclose(ours[name], theirs[name], **tolerance, err_msg=f"{name}, step {ours['step']}")


def test_a_killed_run_continues_bit_for_bit_with_deterministic_operations(tmp_path, monkeypatch):
    # Autotuning chooses kernels by their time, which differs from one process to the next.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags.strip())
    killed_in_step_5 = (
        "def step(self, n, batch, real=train.Training.step):\n"
        "    real(self, n, batch) if n < 5 else kill(signal.SIGKILL)\n"
        "train.Training.step = step"
    )
    with runs.commands() as command:
        whole, folder = tmp_path / "whole", tmp_path / "run"
        command.start(f"--config={runs.save(whole)}")
        code, said = command.wait()
        assert code == 0, said
        command.start(f"--config={runs.save(folder)}", before=killed_in_step_5)
        code, said = command.wait()
        assert code == -signal.SIGKILL, said
        command.start(f"--config={runs.save(folder)}")
        code, said = command.wait()
        assert code == 0 and "continuing after step" in said, said
    runs.assert_same(folder, whole)


def test_the_devices_memory_is_known():
    """The benchmark and the doctor read it."""
    stats = jax.devices()[0].memory_stats()
    assert 0 < stats["peak_bytes_in_use"] < stats["bytes_limit"]
