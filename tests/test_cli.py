"""The `jaxalign` command: the modules' own commands under one name; the shipped configs; doctor."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxalign import cli, config, doctor, train

ROOT = Path(__file__).parent.parent


def command(*arguments, module="jaxalign.cli", **options):
    words = [sys.executable, "-m", module, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def said(capsys, *arguments):
    cli.main(["jaxalign", *arguments])
    return capsys.readouterr().out


def test_help_lists_every_command_and_imports_nothing_heavy(capsys):
    for arguments in ((), ("--help",), ("help",)):
        text = said(capsys, *arguments)
        assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    program = "import sys, jaxalign.cli; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'absl')))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_command_is_there_and_has_a_main():
    for name in cli.COMMANDS:
        if name == "configs":
            continue
        text = (ROOT / "jaxalign" / f"{name}.py").read_text()
        assert "\ndef main(" in text and '\nif __name__ == "__main__":\n    main()\n' in text
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"jaxalign": "jaxalign.cli:main"}


def test_a_misspelt_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["jaxalign", "trian", "--config=tiny"])
    assert stopped.value.code == 2 and "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["jaxalign", "xyz"])
    assert "did you mean" not in capsys.readouterr().err
    assert said(capsys, "--version").startswith("jaxalign 0.")


def test_a_command_is_its_modules_own(tmp_path):
    arguments = ("--config=configs/tiny.py", "--config.steps=7", "--print_config")
    here, there = command("train", *arguments, cwd=ROOT), command(*arguments, module="jaxalign.train", cwd=ROOT)
    assert (here.returncode, here.stdout) == (0, there.stdout) and json.loads(here.stdout)["steps"] == 7
    wrong = command("train", "--config=tniy")
    assert wrong.returncode == 2 and "config 'tniy' not found" in wrong.stderr and "tiny" in wrong.stderr


# configs


def test_configs_are_listed_with_a_line_each_without_being_run(capsys, tmp_path, monkeypatch):
    lines = said(capsys, "configs").splitlines()
    names = [line.split()[0] for line in lines]
    assert {"tiny", "dpo_smollm2", "dpo_llama3"} <= set(names) and names == sorted(names)
    assert all(len(line.split()) > 4 for line in lines)
    (tmp_path / "mine.py").write_text('"""One line.\n\nMore."""\nraise ValueError\n')
    monkeypatch.setattr(cli, "SHIPPED", tmp_path)
    assert said(capsys, "configs").split(maxsplit=1) == ["mine", "One line.\n"]


def test_a_config_is_copied_here_but_never_over_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--config=tiny.py" in said(capsys, "configs", "--copy", "tiny")
    assert Path("tiny.py").read_text() == (ROOT / "configs" / "tiny.py").read_text()
    assert config.load("tiny.py").steps == 30
    Path("tiny.py").write_text("mine")
    for name, message in (("tiny", "is here already"), ("tinny", "did you mean 'tiny'?")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["jaxalign", "configs", "--copy", name])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert Path("tiny.py").read_text() == "mine"


def test_configs_ship_with_the_package_and_are_found_by_name_from_anywhere(tmp_path):
    # An installed jaxalign is no checkout: jaxalign/configs is a folder of its own there, the link's files.
    shutil.copytree(ROOT / "jaxalign", tmp_path / "jaxalign", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = command("train", "--config=tiny", "--print_config", cwd=tmp_path, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["workdir"] == "runs/tiny", done.stderr
    listed = command("configs", cwd=tmp_path, env=environment)
    assert "tiny " in listed.stdout


def test_setuptools_finds_the_configs_behind_the_link():
    setuptools = pytest.importorskip("setuptools")
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = setuptools.find_namespace_packages(str(ROOT), include=found["include"])
    assert {"jaxalign.configs", "jaxalign.data.samples"} <= set(packages)


# doctor


def test_doctor_finds_this_machine_well(tmp_path):
    environment = {**os.environ, "HF_TOKEN": "hf_thisIsNoRealTokenButLooksLikeOne", "XDG_CACHE_HOME": str(tmp_path)}
    done = command("doctor", "--json", env=environment)
    found = json.loads(done.stdout)
    assert (done.returncode, found["broken"], found["install"]) == (0, [], []), done.stdout
    assert environment["HF_TOKEN"] not in done.stdout + done.stderr
    assert found["hub"] == {"token": "HF_TOKEN", "offline": True}
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert {device["platform"] for device in found["devices"]} == {"cpu"} and len(found["devices"]) == 8
    assert found["attention"]["choice"] == "xla" and found["bfloat16"]["on"] is False
    assert found["host"]["memory"] > 1e9
    assert found["compilation_cache"] == str(tmp_path / "jaxalign" / "compiled")


FINE = {
    "versions": {"python": "3.12.0", "jax": "0.10.2", "libtpu": None},
    "devices": [{"id": n, "platform": "gpu", "kind": "NVIDIA H100", "memory": 60e9} for n in range(2)],
    "host": {"cores": 4, "memory": 8e9},
    "attention": {"choice": "cudnn", "why": "the devices are NVIDIA GPUs"},
    "bfloat16": {"on": True, "why": "so it is"},
    "compilation_cache": "/cache",
    "hub": {"token": None, "offline": False},
    "broken": [],
    "install": [],
}


def test_doctor_says_it_in_lines_and_exits_with_1_where_something_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: FINE)
    doctor.main(["doctor"])
    text = capsys.readouterr().out
    assert "2 x gpu, NVIDIA H100, 60.0 GB for JAX each" in text and "on: cudnn" in text and "all is well" in text
    assert "libtpu" not in text
    broken = {**FINE, "broken": ["flax is missing"], "install": ['pip install "flax>=0.12"']}
    monkeypatch.setattr(doctor, "report", lambda: broken)
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["doctor"])
    text = capsys.readouterr().out
    assert stopped.value.code == 1 and 'pip install "flax>=0.12"' in text and "all is well" not in text


def test_doctor_finds_missing_and_wrong_packages(monkeypatch):
    requires = {
        "jaxalign": ["jax>=0.10", "flax>=0.12", 'torch; extra == "test"', 'colorama; platform_system == "Windows"'],
        "jax": ["jaxlib==0.10.2", 'libtpu==0.0.42.*; extra == "tpu"', 'nvidia-x==1; extra == "cuda"'],
    }
    installed = {"jaxalign": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.11.1", "libtpu": "0.0.41"}
    monkeypatch.setattr(importlib.metadata, "requires", requires.__getitem__)
    monkeypatch.setattr(doctor, "version", installed.get)
    assert list(doctor.unmet("jaxalign")) == [
        ("flax is 0.11.1: jaxalign needs flax>=0.12", 'pip install "flax>=0.12"'),
    ]
    assert not list(doctor.unmet("jax")) and not list(doctor.unmet("jax", "cuda"))
    assert list(doctor.unmet("jax", "tpu")) == [
        ("libtpu is 0.0.41: jax needs libtpu==0.0.42.*", 'pip install "libtpu==0.0.42.*"'),
    ]
    del installed["flax"]
    assert [text for text, _ in doctor.unmet("jaxalign")] == ["flax is missing: jaxalign needs flax>=0.12"]


def test_doctor_finds_a_gpu_and_a_tpu_that_jax_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda package: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor, "GPUS", (str(tmp_path / "nvidia0"),))
    monkeypatch.setattr(doctor, "PCI", tmp_path)
    for name, (vendor, kind) in {"a": ("0x8086", "0x0063"), "b": ("0x1ae0", "0x0042")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{kind}\n")
    assert not list(doctor.unseen({"cpu"}))  # Google's network card is no TPU
    (tmp_path / "b" / "device").write_text("0x0063\n")
    tpu = ("a TPU is here, but JAX sees cpu", 'pip install "jaxalign[tpu]"')
    assert list(doctor.unseen({"cpu"})) == [tpu] and not list(doctor.unseen({"tpu"}))
    (tmp_path / "nvidia0").touch()
    gpu = ("an NVIDIA GPU is here, but JAX sees cpu", 'pip install "jaxalign[cuda]"')
    assert list(doctor.unseen({"cpu"})) == [gpu, tpu]
    monkeypatch.setattr(doctor, "version", lambda package: "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert list(doctor.unseen({"cpu"}))[0] == (f"{gpu[0]}; JAX_PLATFORMS=cpu hides it", None)


def test_doctor_reports_what_fails_instead_of_failing(monkeypatch):
    def fail(*_):
        raise RuntimeError("no driver")

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor, "compute", fail)
    monkeypatch.setattr(train, "use_compilation_cache", refuse)
    monkeypatch.setattr(doctor, "unseen", lambda platforms: [])
    found = doctor.report()
    assert found["broken"][0] == "JAX can't compute: RuntimeError: no driver"
    assert "no compilation cache: read-only" in found["broken"][1]
    assert "no driver" in doctor.show(found)
