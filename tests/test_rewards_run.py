"""Rewards in processes of their own: what a function does wrong costs its rows, never the run."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxalign import rewards
from jaxalign.rewards.scores import Rewards

NAN = np.nan

FUNCTIONS = """
import asyncio, os, re, resource, signal, subprocess, sys, time

def plain(prompts, completions, answer, **columns):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer)]

async def slowly(prompts, completions, *, seconds=0.0, **columns):
    await asyncio.sleep(seconds)
    return [True] * len(completions)

async def judged(prompts, completions, how, **columns):
    async def judge(h):
        if h == "raise":
            raise ConnectionError("refused")
        await asyncio.sleep(60 if h == "sleep" else 0.1)
        return "unsure" if h == "text" else 1.0
    return await asyncio.gather(*map(judge, how))

def told(prompts, completions, completion_ids, scale, kinds):
    import numpy as np
    return np.array([len(p) + scale * len(i) for p, i in zip(prompts, completion_ids)])

def given(completions, **columns):
    return [len(columns)] * len(completions)

def limits(prompts, completions, which, **columns):
    values = {
        "memory": lambda: resource.getrlimit(resource.RLIMIT_AS)[0] / 2**30,
        "core": lambda: resource.getrlimit(resource.RLIMIT_CORE)[0],
        "cpu": lambda: resource.getrlimit(resource.RLIMIT_CPU)[0] < 10 + 30 * os.cpu_count(),
        "platform": lambda: os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == "",
        "imported": lambda: "jax" in sys.modules or "numpy" in sys.modules,
        "main": lambda: hasattr(sys.modules["__main__"], "pytest"),
        "stdin": lambda: len(sys.stdin.read()),
        "pid": os.getpid,
    }
    return [values[w]() for w in which]

def flood(prompts, completions):
    for _ in range(200):
        print("x" * 100_000)
    os.write(2, b"written straight\\n")
    print('{"values": [5.0], "wrong": [null]}')
    if "bad" in completions:
        raise RuntimeError("after the flood")
    return [1.0] * len(completions)

def lost(prompts, completions, log, then):
    with open(log[0], "a") as file:
        file.write("called\\n")
    if then[0] == "die":
        os._exit(1)
    time.sleep(60)

def started(file, stays):
    with open(file, "a") as out:
        out.write(f"{os.getpid()}\\n")
    time.sleep(stays)

def misbehave(prompts, completions, how, file=None, **columns):
    for n, h in enumerate(how):
        if h == "regular expression":
            re.fullmatch(r"(a+)+b", "a" * 64)
        if h == "raise":
            raise KeyError("no such thing")
        if h == "exit":
            sys.exit("leaving")
        if h == "die":
            os._exit(7)
        if h == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if h == "memory":
            bytearray(1 << 36)
        if h == "fork":
            if os.fork() == 0:
                started(file[n], 60)
            started(file[n], 60)
        if h == "leave":
            code = f"import os, time; open({file[n]!r}, 'a').write(f'{{os.getpid()}}\\\\n'); time.sleep(60)"
            subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
            started(file[n], 60)
        if h == "come back twice":
            os.fork()
        if h == "close":
            os.close(1), os.close(2)
    if how[0] == "no list":
        return 1.0
    if "count" in how:
        return [1.0]
    wrong = {"nan": float("nan"), "inf": -float("inf"), "large": 1e39, "text": "1.0", "list": [1.0, 2.0], "none": None}
    return [wrong.get(h, 1.0) for h in how]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(scope="module")
def misbehaving(folder):
    with rewards.load(
        ["functions.misbehave"], config_folder=folder, timeout=0.8, memory_gb=1.0, max_error_rate=1.0
    ) as scorer:
        yield scorer


def call(scorer, n=None, **columns):
    n = n or len(next(iter(columns.values())))
    return scorer(["q"] * n, ["c"] * n, columns, completion_ids=[[1, 2]] * n)


def gone(pid, seconds=5.0):
    """Whether a process has ended, or ends within this time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_functions_get_rows_columns_and_options_and_run_together(folder):
    names = ["functions.plain", f"{folder}/functions.py:slowly", "functions.told", "functions.given", "number"]
    options = {"functions.told": {"scale": 10}, "slowly": {"seconds": 0.1}}
    columns = {"answer": ["3", None, "5"], "kinds": [{"a": 1}, [2], None], "scale": ["an option has its name"] * 3}
    columns |= {"prompt": ["x"] * 3, "completions": [0] * 3}
    ids = [np.arange(n, dtype=np.int32) for n in (1, 2, 3)]
    with rewards.load(names, options, config_folder=folder, columns=columns, workers=2) as scorer:
        scores = scorer(["a", "bb", "ccc"], ["3", "4", "4"], columns, completion_ids=ids)
        assert scorer.error_rate == dict.fromkeys(scorer.names, 0.0)
        with pytest.raises(ValueError, match="column 'answer' has 2 entries for 3 completions"):
            scorer(["a", "bb", "ccc"], ["3", "4", "4"], {"answer": ["3", "4"]}, completion_ids=ids)
        nothing = scorer([], [], {"answer": []}, completion_ids=[])
    assert scorer.names == ("plain", "slowly", "told", "given", "number")
    expected = [[1, 1, 11, 5, 1], [NAN, 1, 22, 5, NAN], [0, 1, 33, 5, 0]]
    np.testing.assert_array_equal(scores.values, np.array(expected, np.float32))
    assert scores.values.dtype == np.float32 and not scores.errors.any() and scores.traceback is None
    assert nothing.values.shape == nothing.errors.shape == (0, 5)


@pytest.mark.parametrize(
    ("how", "clue"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("exit", "SystemExit: leaving"),
        ("die", "its process ended with status 7"),
        ("crash", "was killed by SIGSEGV"),
        ("memory", "MemoryError"),
        ("regular expression", "in fullmatch"),
        ("fork", "longer than it may"),
        ("leave", "longer than it may"),
        ("count", "expected a list of 3 numbers or None, got 1"),
        ("nan", "finite float32"),
        ("inf", "finite float32"),
        ("large", "finite float32"),
        ("text", "got '1.0'"),
        ("list", "got list"),
    ],
)
def test_a_misdeed_costs_its_row(misbehaving, tmp_path, how, clue):
    file = str(tmp_path / "pids")
    scores = call(misbehaving, how=["", how, ""], file=[file] * 3)
    bad = [how == "count", True, how == "count"]  # whose the rewards are that came, nobody knows
    np.testing.assert_array_equal(scores.errors[:, 0], bad)
    np.testing.assert_array_equal(scores.values[:, 0], np.where(bad, NAN, np.float32(1)))
    assert scores.traceback.startswith("reward misbehave: ") and clue in scores.traceback
    if how in ("fork", "leave"):
        pids = Path(file).read_text().split()
        assert len(pids) >= 3 and all(map(gone, pids))


def test_an_async_functions_rows_are_asked_for_alone_at_the_same_time(folder):
    how = ["raise", "sleep", "text"] + [""] * 40  # that take 4 s one after another
    with rewards.load(["functions.judged"], config_folder=folder, timeout=0.8, max_error_rate=1.0) as scorer:
        scores = call(scorer, how=how)
    np.testing.assert_array_equal(scores.errors[:, 0], [True] * 3 + [False] * 40)
    np.testing.assert_array_equal(scores.values[3:], 1)
    assert "got 'unsure'" in scores.traceback


def test_rows_without_a_column_that_is_asked_for_have_none(folder):
    """Rows of an evaluation, say: training rows have it, or the run would not begin."""
    with rewards.load(["functions.plain"], config_folder=folder, columns=["answer"]) as scorer:
        scores = scorer(["q"] * 2, ["c"] * 2, {}, completion_ids=[[1]] * 2)
    assert np.isnan(scores.values).all() and not scores.errors.any()
    with rewards.load(["functions.plain"], config_folder=folder) as scorer:  # not known to be a column of anything
        lost = scorer(["q"], ["c"], {}, completion_ids=[[1]])
    assert lost.errors.all() and "missing 1 required positional argument: 'answer'" in lost.traceback


def test_none_is_no_failure_and_a_number_for_all_is_one(misbehaving):
    scores = call(misbehaving, how=["none", "", "none"])
    np.testing.assert_array_equal(scores.values[:, 0], [NAN, 1, NAN])
    assert not scores.errors.any()
    scores = call(misbehaving, how=["no list"])
    assert scores.errors.all() and "'float' object is not iterable" in scores.traceback


def test_a_process_that_comes_back_twice_and_one_that_closes_its_output(misbehaving):
    for how in ("come back twice", "close"):
        for hows, expected in (["", how], [1, 1]), (["none", ""], [NAN, 1]), (["", "none", "none"], [1, NAN, NAN]):
            np.testing.assert_array_equal(call(misbehaving, how=hows).values[:, 0], expected)


@pytest.mark.parametrize(("then", "timeout"), [("hang", 0.4), ("die", 20.0)])
def test_rows_that_are_all_lost_are_not_all_asked_for(folder, tmp_path, then, timeout):
    with rewards.load(["functions.lost"], config_folder=folder, timeout=timeout, max_error_rate=1.0) as scorer:
        log = tmp_path / "log"
        scores = call(scorer, log=[str(log)] * 40, then=[then] * 40)
    assert scores.errors.all()
    assert 2 <= len(log.read_text().split()) <= 9  # together, and alone 8 times


def test_what_is_printed_is_kept_from_terminal_and_protocol(folder, capfd):
    with rewards.load(["functions.flood"], config_folder=folder) as scorer:
        fine = scorer(["q"], ["fine"], {}, completion_ids=[[1]])
        bad = scorer(["q"], ["bad"], {}, completion_ids=[[1]])
    assert fine.values == 1.0 and bad.errors.all()
    assert "RuntimeError: after the flood" in bad.traceback and "written straight" in bad.traceback
    assert len(bad.traceback) < 10_000
    assert "xxx" not in "".join(capfd.readouterr()).replace(bad.traceback, "")


def test_a_reward_that_fails_too_often_stops_the_run(folder):
    many = {"how": ["raise"] * 3 + [""] * 13}
    with rewards.load(["functions.misbehave"], config_folder=folder, max_error_rate=0.2) as scorer:
        assert call(scorer, how=["raise", "", "", ""]).errors.sum() == 1  # one of few
        assert call(scorer, how=["", "raise", "raise", ""]).errors.sum() == 2
        assert scorer.error_rate == {"misbehave": 3 / 8}
        with pytest.raises(RuntimeError, match=r"reward misbehave failed on 4 of 12 .*(?s:.*)KeyError"):
            call(scorer, how=["", "raise", "", ""])
        assert call(scorer, **many).errors.sum() == 3  # of its own 16
        with pytest.raises(RuntimeError, match="failed on 4 of 16 completions, more than rewards.max_error_rate"):
            call(scorer, how=["raise"] * 4 + [""] * 12)


def test_limits_and_no_accelerator(folder):
    with rewards.load(["functions.limits"], config_folder=folder, timeout=30.0, memory_gb=2.0) as scorer:
        which = ["memory", "core", "cpu", "platform", "imported", "main", "stdin"]
        np.testing.assert_array_equal(call(scorer, which=which).values[:, 0], [2, 0, 1, 1, 0, 0, 0])
        pid = int(call(scorer, which=["pid"]).values.item())
    assert gone(pid)


def test_workers_end_with_a_trainer_that_is_killed_and_do_not_run_its_script(folder, tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "script.py").write_text(
        'open("ran", "a").write("once ")\n'
        "from jaxalign import rewards\n"
        'scorer = rewards.load(["functions.misbehave"])\n'
        'scorer(["q"], ["c"], {"how": ["fork"], "file": ["pids"]}, completion_ids=[[1]])\n'
    )
    for command in (["script.py"], ["-m", "script"]):
        trainer = subprocess.Popen([sys.executable, *command], cwd=tmp_path)
        try:
            until = time.monotonic() + 30
            while not (pids := tmp_path / "pids").is_file() or len(pids.read_text().split()) < 2:
                assert time.monotonic() < until and trainer.poll() is None
                time.sleep(0.02)
        finally:
            trainer.kill()
            trainer.wait()
        assert all(map(gone, pids.read_text().split()))
        assert (tmp_path / "ran").read_text() == "once "
        pids.unlink()
        (tmp_path / "ran").unlink()


def test_a_model_is_called_here_and_what_is_not_finite_is_a_failure():
    def model(prompts, completions, completion_ids):
        return np.array(
            [len(p) + len(c) + len(i) for p, c, i in zip(prompts, completions, completion_ids, strict=True)]
        )

    def broken(prompts, completions, completion_ids):
        return np.array([1.0, NAN])

    with Rewards({"model:a": model, "model:b": broken}, max_error_rate=1.0) as scorer:
        scores = scorer(["a", "bb"], ["", "c"], {}, completion_ids=[[1], [2, 3]])
    np.testing.assert_array_equal(scores.values, np.array([[2, 1], [5, NAN]], np.float32))
    np.testing.assert_array_equal(scores.errors, [[False, False], [False, True]])
    assert scores.traceback == "reward model:b: a reward that is not finite"
    with pytest.raises(ValueError, match="model:a has no 'batchsize'; did you mean 'batch_size'"):
        rewards.load(["model:a"], {"model:a": {"batchsize": 2}})


def test_what_cannot_be_loaded_is_named_at_the_start(folder):
    def refused(match, names, options=None, **more):
        with pytest.raises(ValueError, match=match):
            rewards.load(names, options, config_folder=folder, **more).close()

    refused("no 'numbr'; did you mean 'number'", ["numbr"])
    refused("no function 'plan'; did you mean 'plain'", ["functions.plan"])
    refused("is called plain in metrics", ["functions.plain", "elsewhere.plain"])
    refused("there is no reward 'plane'; did you mean 'plain'", ["functions.plain"], {"plane": {}})
    refused("told has no argument 'scales'; did you mean 'scale'", ["functions.told"], {"told": {"scales": 1}})
    refused(
        "plain asks for 'answer', which is neither a column of the data .text.",
        ["functions.plain"],
        columns=["text"],
    )
    refused("overlong: ValueError: cache=9", ["overlong"], {"overlong": {"max_completion_length": 4, "cache": 9}})
    (folder / "broken.py").write_text("import os\nprint('before')\nos.no_such_name\n")
    refused("can't be loaded: Traceback(?s:.*)no_such_name(?s:.*)before", ["broken.anything"])


def test_a_worker_and_its_rewards_import_neither_jax_nor_numpy():
    code = (
        "import sys; from jaxalign import rewards; from jaxalign.rewards import worker, format, math; "
        "assert not {'jax', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
