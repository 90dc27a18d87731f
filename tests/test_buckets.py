"""Models, data, caches, runs and exports in a bucket: equal to those on a disk, and whole when a process is killed."""

import ast
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import buckets
import jax
import numpy as np
import pytest
import runs

from jaxalign import checkpoint, config, diagnose, hf, metrics, paths, train
from jaxalign.checkpoint import Checkpoints
from jaxalign.data.rows import read_rows
from jaxalign.metrics import MetricsWriter

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def server():
    with buckets.Server() as server:
        # Not taken back at the end: tensorstore keeps what it found at first.
        os.environ.update(server.environment)
        yield server


@pytest.fixture
def bucket(server, request):
    name = f"jaxalign-{len(server.buckets)}"
    server.buckets[name] = buckets.Bucket(name)
    return server.buckets[name]


@pytest.fixture
def root(bucket):
    return paths.at(f"gs://{bucket.name}")


# Paths


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_file_is_written_whole_and_read_in_parts(place, bucket, root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = (root if place == "bucket" else paths.at("~")) / "a" / "b.txt"
    assert not file.exists() and not file.parent.is_dir()
    paths.make_folder(file.parent)
    assert not bucket.history  # there is nothing to make
    paths.replace(file, b"hello world")
    assert (file.read_text(), paths.size(file), file.parent.is_dir()) == ("hello world", 11, True)
    assert [paths.read_range(file, *span) for span in ((0, 5), (6, 5), (3, 0))] == [b"hello", b"world", b""]
    with pytest.raises(EOFError, match="ends after 11 bytes, expected 12"):
        paths.read_range(file, 6, 6)
    before = paths.content_hash(file)
    paths.replace(file, b"other")
    assert file.read_bytes() == b"other" and paths.content_hash(file) != before
    with pytest.raises(FileNotFoundError):
        paths.size(file.parent / "c")
    assert [path.name for path in file.parent.iterdir()] == ["b.txt"]


def test_only_the_bytes_asked_for_are_fetched(root, monkeypatch):
    paths.replace(root / "file", bytes(1 << 20))
    sent = []
    real = buckets._Handler._answer

    def answer(self, status, content=b"", **headers):
        sent.append(len(content))
        real(self, status, content, **headers)

    monkeypatch.setattr(buckets._Handler, "_answer", answer)
    assert paths.read_range(root / "file", 1000, 10) == bytes(10)
    assert sent == [10]


def test_patterns_name_files_here_and_in_a_bucket(root, tmp_path):
    for folder in (root, tmp_path):
        for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "d.txt"):
            paths.make_folder((folder / name).parent)
            paths.replace(folder / name, b"x")
        for pattern, names in (
            ("*.jsonl", ["a.jsonl", "b.jsonl"]),
            ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]),
            ("e*", []),
            ("de*", []),  # a folder
        ):
            assert paths.glob(f"{folder}/{pattern}") == [folder / name for name in names]


def test_what_another_process_wrote_is_listed_at_once(bucket, root):
    paths.replace(root / "run" / "1", b"x")
    assert [path.name for path in (root / "run").iterdir()] == ["1"]
    bucket.put("run/2", b"x", {})
    assert sorted(path.name for path in (root / "run").iterdir()) == ["1", "2"]


def test_a_bucket_that_is_not_there_is_named_before_anything_else(server, tmp_path):
    with pytest.raises(ValueError, match="the bucket 'nowhere' can't be read .*gcloud auth"):
        runs.run("gs://nowhere/run")
    with pytest.raises(ValueError, match="the bucket 'nowhere'"):
        runs.run(tmp_path / "run", data__cache_dir="gs://nowhere/cache")


def test_other_urls_and_a_missing_gcsfs_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="'s3://bucket/x': expected a local path or gs://"):
        paths.at("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    paths._buckets.cache_clear()
    with pytest.raises(ValueError, match=re.escape('pip install "jaxalign[gcs]"')):
        paths.at("gs://bucket/x")


def test_local_paths_never_import_what_reads_buckets(tmp_path):
    program = f"""
import sys
from jaxalign import checkpoint, metrics, paths, run_folder, train
path = paths.at({str(tmp_path)!r}) / "x"
paths.replace(path, b"12"), paths.read_range(path, 0, 1), paths.size(path), path.exists(), paths.glob(str(path))
metrics.MetricsWriter(path.parent).close(), checkpoint.list_steps(path.parent)
print(sorted({{"fsspec", "gcsfs", "tensorflow", "google.cloud.storage", "orbax"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


def test_tensorflow_is_not_loaded_for_a_bucket_where_it_is_installed(root, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise ImportError('loaded')")
    program = f"from jaxalign import paths; print(paths.at('{root}/x').exists())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "False\n", done.stderr


def test_tensorboard_needs_a_disk():
    with pytest.raises(ValueError, match="log.tensorboard.*gs://bucket/run"):
        config.validate(runs.config("gs://bucket/run", log__tensorboard=True))


# Metrics


def write(folder, steps, **kw):
    with MetricsWriter(folder, **kw) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})
            writer.completions(step, [{"text": "ä"}])
        return writer.sizes()


def test_metrics_in_a_bucket_are_those_on_a_disk_resumed_or_not(bucket, root, tmp_path):
    for folder in (root / "run", tmp_path / "run"):
        write(folder, range(1, 6))
        sizes = write(folder, range(3, 5), start_step=2)
        write(folder, range(5, 9), start_step=4, sizes=sizes)
    for name in metrics.STEP_FILES:
        assert (root / "run" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert [line["step"] for line in metrics.read_metrics(root / "run")] == list(range(1, 9))


def test_lines_are_cut_to_the_size_that_the_checkpoint_knows(root):
    sizes = write(root, [1, 2])
    write(root, [2], start_step=2)  # an evaluation after the save of step 2, say
    write(root, [3], start_step=2, sizes=sizes)
    assert [line["step"] for line in metrics.read_metrics(root)] == [1, 2, 3]


def test_lines_reach_a_bucket_when_flushed_and_after_half_a_minute(bucket, root, monkeypatch):
    def there():
        return [line["step"] for line in metrics.read_metrics(root)]

    with MetricsWriter(root) as writer:
        n = len(bucket.history)
        for step in range(1, 100):
            writer.write(step, {"loss": 1.0})
        assert there() == [] and len(bucket.history) == n  # no request a line
        writer.flush()
        assert there() == list(range(1, 100))
        writer.flush()
        assert len(bucket.history) == n + 1  # nothing is new
        monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
        writer.write(100, {"loss": 1.0})
        writer._wait()
        assert there()[-1] == 100


def test_a_failed_upload_is_not_passed_over(bucket, root, monkeypatch):
    writer = MetricsWriter(root)
    writer.write(1, {"loss": 1.0})
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(paths, "replace", lambda *_: (_ for _ in ()).throw(OSError("no network")))
        writer.flush()
    writer.close()
    assert len(metrics.read_metrics(root)) == 1


# Checkpoints


def state(value):
    return {"params": {"w": jax.numpy.full((64, 8), value, np.float32)}, "key": jax.random.key(int(value))}


def abstract():
    return jax.eval_shape(lambda: state(0.0))


def telling(moments):
    """All moments around a step's commit, and every tenth of the others."""

    def marks(n):
        found = moments[n % len(moments)].items()
        return {name: one.generation for name, one in found if re.fullmatch(rf"c/[^/]+/{checkpoint.COMMITTED}", name)}

    return [one for n, one in enumerate(moments) if n % 10 == 0 or not marks(n - 1) == marks(n) == marks(n + 1)]


def files_of(objects, step):
    return {name.partition(f"/{step}/")[2]: found.content for name, found in objects.items() if f"/{step}/" in name}


def test_orbax_still_calls_its_files_so():
    from orbax.checkpoint._src.path import atomicity_types

    assert checkpoint.COMMITTED == atomicity_types.COMMIT_SUCCESS_FILE
    assert checkpoint.UNFINISHED == atomicity_types.TMP_DIR_SUFFIX


def test_checkpoints_keep_the_newest_and_the_best_and_restore(root):
    with Checkpoints(root / "c", keep=1, keep_best=1, best_metric="m", best_mode="min") as checkpoints:
        for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
            checkpoints.save(step, state(step), {"step": step}, metrics={"m": metric})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4] and checkpoints.best_steps() == [2, 4]
    with Checkpoints(root / "c") as checkpoints:
        restored = checkpoints.restore(abstract())
        assert restored.step == 4 and restored.meta == {"step": 4}
        assert checkpoint.checksums(restored.state) == checkpoint.checksums(state(4))
        assert checkpoints.restore(abstract(), step=2).step == 2
        assert checkpoints.steps() == [2] and (root / "c" / "4.aside").is_dir()
    step, params, _ = checkpoint.restore_params(root / "c", abstract()["params"], "best")
    assert step == 2 and params["w"][0, 0] == 2


@pytest.mark.parametrize("change", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("new", "anew")), "aside"])
def test_killed_at_any_moment_each_step_is_whole_or_not_there(bucket, root, change):
    """Every state that the bucket passes through is what a kill may leave."""
    with Checkpoints(root / "c", keep=2) as checkpoints:
        checkpoints.save(1, state(1), {"value": 1})
        checkpoints.save(2, state(2), {"value": 2})
        checkpoints.wait()
        before = bucket.objects
        bucket.history.clear()
        if change == "new":
            checkpoints.save(3, state(3), {"value": 3})  # and deletes step 1
        elif change == "anew":
            checkpoints.save(2, state(22), {"value": 22}, force=True)
        else:
            checkpoints.restore(abstract(), step=1)
        checkpoints.wait()
    moments, after = list(bucket.history), bucket.objects
    assert len(moments) > 15 and moments[-1] == after
    whole = {}
    for objects, step in itertools.product((before, after), (1, 2, 3)):
        whole.setdefault(step, []).append(files_of(objects, step))
    seen, moments, killed_again = set(), telling(moments), False
    for objects in moments:
        bucket.objects = objects
        bucket.history.clear()
        with Checkpoints(root / "c", keep=2) as checkpoints:
            steps = checkpoints.steps()
        if not killed_again and len(files_of(bucket.objects, 2)) > len(files_of(objects, 2)):
            killed_again = True
            moments += telling(bucket.history)  # which grows the list that is being gone through
        for step in steps:
            found = files_of(bucket.objects, step)
            assert found and found in whole[step], f"step {step} is committed and lacks files"
        assert 2 in steps or (change == "aside" and 1 in steps)  # the newest from before, or what was asked for
        assert not [name for name in bucket.objects if checkpoint.REPLACED in name or "tmp" in name]
        seen.add(tuple(steps))
    assert killed_again == (change == "anew")
    assert seen == {"new": {(1, 2), (1, 2, 3), (2, 3)}, "anew": {(1, 2)}, "aside": {(1, 2), (1,)}}[change]


def test_a_flipped_bit_in_a_bucket_is_found_and_the_step_before_is_taken(bucket, root, caplog):
    with Checkpoints(root / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {})
    name, found = max(bucket.objects.items(), key=lambda item: ("/2/state/" in item[0], len(item[1].content)))
    content = bytearray(found.content)
    content[len(content) // 2] ^= 1
    bucket.objects = {**bucket.objects, name: buckets.Object(found.generation, bytes(content))}
    with Checkpoints(root / "c") as checkpoints:
        assert checkpoints.restore(abstract()).step == 1
    assert "checkpoint 2 in gs://" in caplog.text and "INVALID" in caplog.text


# Data


def test_rows_and_prepared_data_in_a_bucket_equal_those_on_a_disk(bucket, root, tmp_path):
    from jaxalign.data import sources
    from jaxalign.data.tokenizers import byte_tokenizer

    local = runs.shared() / "train.jsonl"
    paths.upload(local, root / "d" / "train.jsonl")
    parquet = io.BytesIO()
    import pandas

    pandas.DataFrame(list(read_rows(str(local)))).to_parquet(parquet)
    paths.replace(root / "p" / "train.parquet", parquet.getvalue())
    for source in (f"{root}/d/train.jsonl", f"{root}/*/*.jsonl", [f"{root}/d/train.jsonl"], f"{root}/p/train.parquet"):
        assert list(read_rows(source)) == list(read_rows(str(local)))
    with pytest.raises(ValueError, match="name its files"):
        read_rows(f"{root}/d")
    with pytest.raises(ValueError, match="no data file 'gs://"):
        read_rows(f"{root}/d/none.jsonl")

    options = {"tokenizer": byte_tokenizer(), "max_length": 40}
    ours = sources.prepare(f"{root}/d/train.jsonl", cache_dir=root / "cache", dropped_path=root / "dropped", **options)
    theirs = sources.prepare(local, cache_dir=tmp_path, **options)
    assert ours.fingerprint == theirs.fingerprint and ours.kept_in == root / "cache"
    assert (root / "dropped").read_text() == ""
    shutil.rmtree(sources._temporary())  # another host
    sources._temporary().mkdir()
    bucket.requests.clear()
    again = sources.prepare(f"{root}/d/train.jsonl", cache_dir=root / "cache", **options)
    assert again.fingerprint == ours.fingerprint and again.text(3) == theirs.text(3)
    assert not {("READ", "d/train.jsonl")} & set(bucket.requests)  # the rows' hash is known without them
    assert {method for method, _ in bucket.requests} == {"GET", "READ"}


# Runs


def values(settings):
    return [f"--config.{name}={value}" for name, value in settings.items()]


@pytest.mark.slow
def test_tiny_trains_is_killed_resumes_elsewhere_and_exports_as_on_one_disk(bucket, root, tmp_path):
    sample = Path(train.__file__).parent / "data" / "samples" / "tiny_pairs.jsonl"
    paths.upload(sample, root / "pairs.jsonl")
    shared = {"compilation_cache": runs.COMPILED, "reference.mode": "cached"}
    here = {"workdir": tmp_path / "run", "data.path": sample, "data.cache_dir": tmp_path / "cache", **shared}
    there = {"workdir": root / "run", "data.path": root / "pairs.jsonl", "data.cache_dir": root / "cache", **shared}
    tiny = f"--config={CONFIGS / 'tiny.py'}"
    kill_at_step_15 = """
real = train.Training.step
def step(self, n, batch):
    if n == 15:
        self.checkpoints.wait()
        kill(signal.SIGKILL)
    real(self, n, batch)
train.Training.step = step
"""
    with runs.commands() as command:
        command.start(tiny, *values(here))
        code, said = command.wait()
        assert code == 0, said
        for host, before in (("first", kill_at_step_15), ("second", "")):
            home = tmp_path / host
            home.mkdir()
            fresh = f"os.chdir({str(home)!r}); os.environ.update(HOME={str(home)!r}, TMPDIR={str(home)!r})\n"
            command.start(tiny, *values(there), before=fresh + before)
            code, said = command.wait()
            assert code == (-signal.SIGKILL if before else 0), said
            if before:
                assert checkpoint.list_steps(root / "run" / "checkpoints") == [10]
                assert [line["step"] for line in runs.lines(root / "run")][-1] == 10
            else:
                assert "continuing after step 10 of 30" in said
                assert not list(home.iterdir())
    runs.assert_same(root / "run", tmp_path / "run")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (root / "run" / "export" / name).read_bytes() == (tmp_path / "run" / "export" / name).read_bytes()
    (_, ours), (_, theirs) = (hf.load(folder / "run" / "export", dtype="float32") for folder in (root, tmp_path))
    assert checkpoint.checksums(ours) == checkpoint.checksums(theirs)
    kept = {name.split("/")[1] for name in bucket.objects if name.startswith("run/")}
    assert kept == {path.name for path in (tmp_path / "run").iterdir()}
    assert [name for name in bucket.objects if name.startswith("cache/reference-")]


@pytest.mark.slow
def test_a_run_in_a_bucket_writes_its_trace_its_dropped_rows_and_its_report(bucket, root):
    rows = [*runs.rows(24), {"prompt": "no answers"}]
    paths.replace(root / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    settings = {"steps": 3, "epochs": None, "export__enabled": False}
    result = runs.run(root / "run", **settings, data__path=f"{root}/rows.jsonl", log__profile_steps=(2, 2))
    assert result.folder == root / "run"
    assert json.loads((root / "run" / "dropped.jsonl").read_text())["row"] == 24
    assert (root / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [name for name in bucket.objects if name.startswith("run/profile/") and name.endswith(".xplane.pb")]
    with pytest.raises(diagnose.NonFinite, match=f"{root}/bad/nonfinite/step_1.json"):
        runs.run(root / "bad", **settings, model__random={**runs.MODEL, "initializer_range": 1e30})
    assert json.loads((root / "bad" / "nonfinite" / "step_1.json").read_text())["step"] == 1


@pytest.mark.slow
def test_two_processes_share_a_run_in_a_bucket(root, tmp_path):
    from test_multiprocess import processes

    settings = {"epochs": None, "steps": 4, "eval__batch_size": 4, "reference__mode": "cached"}
    file = tmp_path / "config.json"
    changed = runs.config(root / "two", **settings, data__cache_dir=f"{root}/cache")
    file.write_text(config.to_json(config.validate(changed)))
    (first, _, errors), (second, _, errors_2) = processes(file)
    assert (first, second) == (0, 0), errors + errors_2
    runs.assert_close(root / "two", runs.run(tmp_path / "one", **settings).folder)
