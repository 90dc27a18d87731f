"""Imports run downward only, and each heavy library has one home (DESIGN)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxalign"

LEVELS = {
    "messages": 0, "segments": 0, "advantages": 0, "detokenize": 0,
    "data.chat": 0, "data.formats": 0, "data.templates": 0, "data.tokenizers": 0,
    "losses": 1, "sharding": 1, "filters": 1, "quantize": 1, "signals": 1, "paths": 1, "config_keys": 1, "user_code": 1,
    "hosts": 2, "metrics": 2, "models": 2, "optim": 2, "config_rules": 2, "config": 3,
    "data.rows": 2, "data.encoding": 2, "data.transform": 2, "data.prepared": 2, "data.sources": 2,
    "safetensors_file": 2, "gather": 2, "xla_flags": 2, "rewards": 2,
    "data.packing": 3, "data.batching": 3, "lora": 3, "logprobs": 3, "decoding": 3,
    "gguf_file": 3, "checkpoint": 3,
    "run_folder": 4, "frozen": 4, "peft_files": 4, "step": 4, "objectives": 4, "sampling": 4, "hf_files": 4,
    "hf": 5, "reference": 5,
    "actor": 6, "rollout": 7, "completions": 6, "tasks": 7, "generate": 7,
    "programs": 7, "build": 8, "evals": 8, "diagnose": 8, "workload": 8,
    "export": 9, "preview": 9, "score": 9, "preflight": 9, "evaluate_task": 9,
    "train": 10, "rewards.model": 10,
    "evaluate": 11, "doctor": 11, "cli": 11,
}  # fmt: skip

HOMES = {
    "flax": {"models"},
    "orbax": {"checkpoint"},
    "transformers": {"data", "hf_files", "gguf_file"},
    "tokenizers": {"data", "gguf_file"},
    "gguf": {"gguf_file"},
    "safetensors": set(),  # ours read by byte range, here and in buckets
    "huggingface_hub": {"paths", "doctor"},
    "datasets": {"data"},
    "grain": {"data"},
    "absl": {
        "config",
        "train",
        "generate",
        "export",
        "preview",
        "preflight",
        "evaluate",
        "evaluate_task",
        "score",
        "doctor",
    },
    "matplotlib": {"metrics"},
    "math_verify": {"rewards"},
    "sympy": {"rewards"},
    "tensorboardX": {"metrics"},
    "torch": set(),
}

FILES = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" or file.parent != PACKAGE]


def module_of(file):
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def level_of(module):
    while module not in LEVELS:
        assert "." in module, f"{module} has no level: give it one in LEVELS"
        module = module.rpartition(".")[0]
    return LEVELS[module]


def imports(file):
    """(module, imported at the top of the file) of every import."""
    tree = ast.parse(file.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            if node.module in ("jaxalign", "jaxalign.data"):
                for alias in node.names:
                    yield f"{node.module}.{alias.name}", id(node) in top
            else:
                yield node.module, id(node) in top


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_run_downward_and_libraries_stay_at_home(file):
    module = module_of(file)
    for name, at_top in imports(file):
        parts = name.split(".")
        if parts[0] == "jaxalign" and len(parts) > 1:
            other = ".".join(parts[1:])
            same = other.split(".")[0] == module.split(".")[0]
            # What is imported where it is used is above on purpose: an entry's help, a check of names.
            assert same or not at_top or level_of(other) < level_of(module), f"{module} imports {other}"
        elif parts[0] in HOMES:
            home = module.split(".")[0]
            assert home in HOMES[parts[0]], f"{parts[0]} is used in {module}, its home is {HOMES[parts[0]]}"


def test_a_missing_level_and_an_upward_import_would_be_found():
    assert level_of("data.formats.hh") == 0 and level_of("models.decoder") == 2
    with pytest.raises(AssertionError, match="has no level"):
        level_of("nonsense")
    found = dict(imports(PACKAGE / "train.py"))
    assert found["jaxalign.build"] and level_of("build") < level_of("train")
