"""The documented base config of a run, and the strict check of every config before anything expensive begins.

`KEYS` is the one place where every key stands with its default, its type and what it does; `base`, the check, the
command line and `python -m jaxalign.config` (which prints the table) derive from it. A config file defines
`get_config(arg=None)` that starts from `base()` and sets keys; a run's config.json is a config file as well. Unknown,
ill-typed, contradictory and inert keys (set, but without effect given the others) are errors, all listed at once.

This module never imports jax; the check of the loss's and the optimizer's options imports the module that defines them.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config.

    `type` is what a value must be (None only where the type says so); `choices` are the strings allowed; `range` is an
    interval such as "(0, 1]" for every number in the value, an open end being infinite.
    """

    name: str
    default: Any
    type: Any
    help: str
    choices: tuple[str, ...] = ()
    range: str = ""


_DTYPES = ("float32", "bfloat16", "float16")

KEYS: tuple[Key, ...] = (
    Key("workdir", None, str | None, "Folder of the run, on a disk that all hosts see: checkpoints, metrics.jsonl, "
        "config.json, export. None: runs/<name of the config file>."),
    Key("steps", None, int | None, "Optimizer updates to make; give either steps or epochs.", range="[1, inf)"),
    Key("epochs", None, float | None, "Passes over the training data; a fraction is allowed.", range="(0, inf)"),
    Key("seed", 0, int, "Seed of the order of the data, of sampling and of random weights.", range="[0, 2147483647]"),
    Key("batch_size", 64, int, "Pairs (rows, for losses without pairs) per update, over all devices and all "
        "accumulation steps.", range="[1, inf)"),
    Key("gradient_accumulation_steps", 1, int, "Micro-batches that one update is split into; must divide batch_size. "
        "Changes memory, not the result.", range="[1, inf)"),
    Key("max_length", 1024, int, "Tokens of prompt + response that a row may have at most.", range="[2, inf)"),
    Key("resume", "auto", str, "auto: continue from workdir's last checkpoint if there is one. force: also when model, "
        "data, loss, optimizer or batch keys changed. never: refuse a workdir that holds a run.",
        choices=("auto", "force", "never")),
    Key("compilation_cache", "auto", str, "Folder of JAX's compilation cache; auto: a private one in the user's cache "
        "folder; none: off."),

    Key("model.path", None, str | None, "Folder (config.json + safetensors), GGUF file, hub id, or package:NAME[/FILE] "
        "for a file inside an installed Python package."),
    Key("model.random", None, dict | None, "Fields of a Hugging Face config.json: train this model from random weights "
        "instead of model.path; needs tokenizer.path."),
    Key("model.compute_dtype", "auto", str, "dtype of activations and matrix products (master weights are float32); "
        "auto: bfloat16 on accelerators, float32 on CPU.", choices=("auto", *_DTYPES)),
    Key("model.remat", "auto", str, "What the backward pass recomputes instead of keeping. none: nothing, full: every "
        "layer, dots: all but matrix products, dots_no_batch: all but products with weights.",
        choices=("auto", "none", "dots", "dots_no_batch", "full")),

    Key("tokenizer.path", None, str | None, "Folder, GGUF file, hub id or package:NAME/FILE; bytes: the built-in byte "
        "tokenizer. None: the model's own."),

    Key("data.path", None, str | None, "Training rows: a file (json, jsonl, csv, parquet; also .gz), a glob, a folder "
        "of a data set, a hub id, or package:NAME/FILE."),
    Key("data.split", None, str | None, "Split of a data set that has several. None: train."),
    Key("data.name", None, str | None, "Configuration (subset) of a hub data set."),
    Key("data.format", "auto", str, "How a row is read; auto: by its columns."),
    Key("data.chat_template", None, str | None, "Jinja text of the chat template. None: the tokenizer's own."),
    Key("data.on_long", "truncate", str, "Rows above max_length: truncate (keeps the response's beginning) or drop.",
        choices=("truncate", "drop")),
    Key("data.max_prompt_length", None, int | None, "Rows with a longer prompt are dropped; a prompt is never cut.",
        range="[1, inf)"),
    Key("data.max_dropped_share", 0.1, float, "A run that would drop more than this share of its rows refuses to "
        "start.", range="[0, 1]"),
    Key("data.buckets", (), tuple[int, ...], "Row lengths to pad to, ascending, the last at least max_length; (): "
        "chosen automatically. One compilation each.", range="[1, inf)"),
    Key("data.max_rows", None, int | None, "Use only the first rows of the data.", range="[1, inf)"),
    Key("data.cache_dir", None, str | None, "Folder of tokenized rows and of cached reference log-probs. None: a "
        "private one in the user's cache folder."),
    Key("data.workers", None, int | None, "Processes that tokenize. None: one a core, for a small file none.",
        range="[0, inf)"),
    Key("data.eval.path", None, str | None, "Evaluation rows, like data.path."),
    Key("data.eval.split", None, str | None, "Split of data.eval.path (of data.path if that is None) to evaluate "
        "on."),
    Key("data.eval.fraction", 0.0, float, "Share of the training rows, chosen by hash, that is held out for "
        "evaluation.", range="[0, 1)"),

    Key("mesh.data", -1, int, "Devices along the data axis: rows are split, weights copied. -1 for one axis: all that "
        "is left.", range="[-1, inf)"),
    Key("mesh.fsdp", 1, int, "Devices along the fsdp axis: rows and weights are split.", range="[-1, inf)"),
    Key("mesh.tensor", 1, int, "Devices along the tensor axis: heads, MLP columns and vocabulary are split.",
        range="[-1, inf)"),
    Key("mesh.sequence", 1, int, "Devices along the sequence axis: a row's tokens are split.", range="[-1, inf)"),

    Key("loss.name", "sigmoid", str, "The objective: sigmoid (DPO), hinge, ipo, robust, sigmoid_norm, or a sum such as "
        "sigmoid+sft."),
    Key("loss.weights", (), tuple[float, ...], "Weights of the terms of a sum, in its order; (): 1 each."),
    Key("loss.beta", 0.1, float, "Strength of the pull towards the reference (ipo: its tau).", range="(0, inf)"),
    Key("loss.label_smoothing", 0.0, float, "Probability that a label is swapped (sigmoid: conservative DPO; robust: "
        "its epsilon).", range="[0, 0.5)"),
    Key("loss.length_normalize", True, bool, "ipo: compare averages over tokens instead of sums."),

    Key("reference.mode", "live", str, "live: scored before each step. cached: all rows scored once before the first "
        "step and kept on disk.", choices=("live", "cached")),
    Key("reference.path", None, str | None, "Reference model, like model.path. None: the policy as it begins."),
    Key("reference.sync_every", 0, int, "Move the reference towards the policy every so many steps; 0: never.",
        range="[0, inf)"),
    Key("reference.sync_alpha", 0.6, float, "Share of the policy in a moved reference.", range="(0, 1]"),

    Key("optim.name", "adamw", str, "Optimizer: a name of jaxalign.optim."),
    Key("optim.learning_rate", 1e-6, float, "Peak learning rate.", range="(0, inf)"),
    Key("optim.schedule", "linear", str, "Learning rate after the warm-up: constant, or down to "
        "final_ratio linearly or by cosine.", choices=("constant", "linear", "cosine")),
    Key("optim.warmup_steps", 0, int, "Steps of linear warm-up from 0.", range="[0, inf)"),
    Key("optim.warmup_ratio", None, float | None, "The same as a share of all steps.", range="[0, 1]"),
    Key("optim.final_ratio", 0.0, float, "Share of the learning rate that is left at the last step.", range="[0, 1]"),
    Key("optim.b1", None, float | None, "Decay rate of the first moment. None: the optimizer's own (adamw: 0.9).",
        range="[0, 1)"),
    Key("optim.b2", None, float | None, "Decay rate of the second moment. None: the optimizer's own (adamw: 0.999).",
        range="[0, 1)"),
    Key("optim.eps", None, float | None, "Added to a denominator. None: the optimizer's own (adamw: 1e-8).",
        range="[0, inf)"),
    Key("optim.momentum", None, float | None, "Decay rate of the summed gradient of sgd and muon. None: the "
        "optimizer's own.", range="[0, 1)"),
    Key("optim.weight_decay", 0.0, float, "Decoupled decay of kernels and embeddings, times the learning rate.",
        range="[0, inf)"),
    Key("optim.moments_dtype", None, str | None, "dtype of the first moment (or momentum). None: float32.",
        choices=_DTYPES),
    Key("optim.max_grad_norm", 1.0, float | None, "Gradients are scaled down to this global norm. None: no clipping.",
        range="(0, inf)"),
    Key("optim.nonfinite", "stop", str, "On a gradient that isn't finite: stop (with a report) or skip the step (and "
        "count it).", choices=("stop", "skip")),

    Key("checkpoint.every", 100, int, "Steps between checkpoints; 0: only by time, at a signal and at the end.",
        range="[0, inf)"),
    Key("checkpoint.every_minutes", 0.0, float, "Minutes between checkpoints; 0: only by steps.", range="[0, inf)"),
    Key("checkpoint.keep", 2, int, "Latest checkpoints to keep.", range="[1, inf)"),
    Key("checkpoint.keep_best", 0, int, "Best checkpoints to keep besides.", range="[0, inf)"),
    Key("checkpoint.best_metric", None, str | None, "Evaluation metric that says which is best, e.g. "
        "eval_rewards/accuracies."),
    Key("checkpoint.best_mode", None, str | None, "Whether the best metric is the largest (max) or smallest (min).",
        choices=("min", "max")),

    Key("eval.every", 100, int, "Steps between evaluations; 0: only at the end.", range="[0, inf)"),
    Key("eval.at_start", True, bool, "Evaluate before the first step too."),
    Key("eval.batch_size", None, int | None, "Pairs per evaluation batch over all devices. None: as in a micro-batch.",
        range="[1, inf)"),
    Key("eval.max_rows", None, int | None, "Evaluate on the first rows only: the same ones every time.",
        range="[1, inf)"),

    Key("samples.every", 0, int, "Steps between completions of fixed prompts (always before and after); 0: at each "
        "evaluation.", range="[0, inf)"),
    Key("samples.prompts", 0, int | tuple[str, ...], "Prompts as texts, or how many to take from the evaluation (else "
        "training) rows; 0: no completions.", range="[0, inf)"),
    Key("samples.max_new_tokens", 64, int, "Tokens of a completion at most.", range="[1, inf)"),
    Key("samples.temperature", 0.0, float, "0: greedy.", range="[0, inf)"),

    Key("log.every", 1, int, "Steps between lines of metrics.jsonl.", range="[1, inf)"),
    Key("log.tensorboard", False, bool, "Write TensorBoard files too (needs tensorboardX)."),
    Key("log.profile_steps", (), tuple[int, ...], "(first, last): write a profiler trace of these steps.",
        range="[1, inf)"),

    Key("early_stopping.metric", None, str | None, "Stop when this evaluation metric no longer improves."),
    Key("early_stopping.patience", 3, int, "Evaluations without an improvement until the stop.", range="[1, inf)"),
    Key("early_stopping.mode", None, str | None, "Whether the metric should grow (max) or fall (min).",
        choices=("min", "max")),

    Key("export.enabled", True, bool, "Write a Hugging Face folder to <workdir>/export at the end."),
    Key("export.dtype", "source", str, "dtype of the exported weights; source: that of the model it began from.",
        choices=("source", *_DTYPES)),
    Key("export.step", "last", str, "Which checkpoint to export.", choices=("last", "best")),
)  # fmt: skip

_BY_NAME = {key.name: key for key in KEYS}

RESUME_MAY_CHANGE = (
    "workdir", "steps", "epochs", "resume", "compilation_cache", "log", "eval", "samples", "checkpoint", "mesh",
    "export", "early_stopping", "data.cache_dir", "data.workers",
)  # fmt: skip
"""Keys, or first parts of keys, that a resumed run may change; any other change needs resume="force"."""

_NOT_SAVED = ("resume",)  # says how one start was asked for, not what the run is

# What a secret looks like: keys of hubs and trackers, or a password inside an address. They come from the environment.
_SECRET = re.compile(r"\b(hf|sk|ghp|gsk|xox[bp])[_-][A-Za-z0-9_-]{16,}|://[^/\s:@]+:[^/\s@]+@|\b[0-9a-f]{40}\b")


def base() -> ConfigDict:
    """A new config with every key at its default. Types are checked by `validate`, not at assignment."""
    return _nest({key.name: key.default for key in KEYS})


def describe() -> str:
    """The table of all keys: name, default, type or choices, range, meaning. One line each, a blank line a section."""
    lines: list[str] = []
    section = ""
    for key in KEYS:
        head, dot, _ = key.name.partition(".")
        if dot and head != section:
            lines.append("")
            section = head
        kind = "|".join(key.choices) if key.choices else f"{_type_name(key.type)} {key.range}".strip()
        lines.append(f"{key.name:24} {json.dumps(key.default):10} {kind:24} {key.help}")
    return "\n".join(lines)


def load(source: str, overrides: Sequence[str] = (), arg: str | None = None) -> ConfigDict:
    """The checked config of a run.

    Args:
      source: a Python file with `get_config(arg=None)`, optionally followed by `:arg`; a run's config.json; or the name
        of a file in configs/ without its ".py".
      overrides: "key=value" (also "config.key=value"), the value read by the key's type: `none`, `true`, `1e-6`,
        `(1,2)` or `1,2`, text as it stands.
      arg: handed to get_config; the same as `:arg`.

    Raises:
      ValueError: the file can't be used, or `validate` refuses the result; every problem is listed.
    """
    given, default_workdir = _read(source, arg)
    problems: dict[str, str] = {}
    flat = _flatten(given)
    for text in overrides:
        name, equals, value = text.removeprefix("config.").partition("=")
        if not equals:
            problems[name] = f"override {text!r} has no value: write {name}=VALUE"
            continue
        try:
            flat = _override(flat, name, value)
        except ValueError as error:
            problems[name] = str(error)
    if flat.get("workdir") is None:
        flat["workdir"] = default_workdir
    return _validate(flat, problems, Given())


def validate(
    config: ConfigDict | Mapping[str, Any],
    *,
    n_devices: int | None = None,
    has_dataset: bool = False,
    has_eval_dataset: bool = False,
) -> ConfigDict:
    """The complete config (missing keys at their defaults, numbers and tuples of the declared types), or an error.

    Args:
      config: nested, complete or not.
      n_devices: devices of all hosts; given, the mesh and what must be divisible by it are checked too.
      has_dataset: the training rows are handed over in Python, so data.path must be None.
      has_eval_dataset: the same of the evaluation rows and data.eval.

    Raises:
      ValueError: one line for every unknown, ill-typed, contradictory or inert key.
    """
    given = Given(n_devices, has_dataset, has_eval_dataset)
    return _validate(_flatten(config), {}, given)


def loss_arguments(config: ConfigDict) -> tuple[dict[str, float], dict[str, Any]]:
    """What `objectives.pairwise` wants of `loss.*`: {term: weight} in the order of loss.name, and their options."""
    names = config.loss.name.split("+")
    weights = config.loss.weights or (1.0,) * len(names)
    options = frozenset[str]().union(*(_loss_options(name) or () for name in names))
    return dict(zip(names, weights, strict=True)), {option: config.loss[option] for option in sorted(options)}


def to_json(config: ConfigDict | Mapping[str, Any]) -> str:
    """A config as text that `load` reads again, equal in every key but `resume` (which is said at each start)."""
    flat = _flatten(config)
    ordered = {key.name: flat[key.name] for key in KEYS if key.name in flat and key.name not in _NOT_SAVED}
    return json.dumps(_nest(ordered).to_dict(), indent=2) + "\n"


def diff(old: Mapping[str, Any] | ConfigDict, new: Mapping[str, Any] | ConfigDict) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) for every key that differs; a key that one side lacks stands at its default."""
    defaults = {key.name: key.default for key in KEYS}
    old_flat, new_flat = ({**defaults, **{k: _plain(v) for k, v in _flatten(c).items()}} for c in (old, new))
    names = [*defaults, *sorted((old_flat.keys() | new_flat.keys()) - defaults.keys())]
    changed = []
    for name in names:
        before, after = old_flat.get(name), new_flat.get(name)
        if before != after:
            changed.append((name, before, after))
    return changed


def check_resume(
    old: Mapping[str, Any] | ConfigDict, new: Mapping[str, Any] | ConfigDict
) -> list[tuple[str, Any, Any]]:
    """What changed since the run in `workdir` began, if a resumed run may change it or new.resume is "force".

    Raises:
      ValueError: keys that decide what the run computes differ; each is listed as old -> new.
    """
    changed = diff(old, new)
    refused = [(k, a, b) for k, a, b in changed if not k.startswith(tuple(p + "." for p in RESUME_MAY_CHANGE))
               and k not in RESUME_MAY_CHANGE]  # fmt: skip
    if refused and new.get("resume", "auto") != "force":
        lines = "".join(f"\n  {name}: {before!r} -> {after!r}" for name, before, after in refused)
        raise ValueError(
            f"the run in {new.get('workdir')} was started with another config:{lines}\nTake another workdir, set the "
            "keys back, or go on with the new values by --resume=force"
        )
    return changed


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --config, --print_config, --help_config and --resume on `values`, once."""
    if "config" in values:
        return
    flags.DEFINE_string(
        "config", None, "Config of the run: FILE.py[:arg], a run's config.json, or a name in configs/. "
        "Set keys by --config.KEY=VALUE; --help_config lists them.", flag_values=values)  # fmt: skip
    flags.DEFINE_bool("print_config", False, "Print the config as JSON, which is a --config itself, and stop.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_bool(
        "help_config", False, "Print every key with its default and meaning, and stop.", flag_values=values
    )
    flags.DEFINE_enum("resume", None, _BY_NAME["resume"].choices, "Short for --config.resume.", flag_values=values)


def parse(argv: Sequence[str] | None = None, values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
    """The config that a command line asks for; other flags defined on `values` are parsed along.

    Args:
      argv: the program's name and its arguments; sys.argv when None.
      values: where the flags live; `define_flags` is called on it.

    Raises:
      SystemExit: 0 after --print_config, --help_config or --help; 2 after a mistake, which is printed to stderr.
    """
    define_flags(values)
    arguments, overrides = _split_overrides(list(sys.argv if argv is None else argv))
    program = Path(arguments[0]).name
    try:
        if rest := values(arguments)[1:]:
            raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        if values.help_config:
            print(describe())
            raise SystemExit(0)
        if values.config is None:
            raise ValueError(f"--config is missing: a .py file, a run's config.json, or one of {_named_configs()}")
        if values.resume is not None:
            overrides.append(f"resume={values.resume}")
        config = load(values.config, overrides)
    except (flags.Error, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if values.print_config:
        print(to_json(config), end="")
        raise SystemExit(0)
    return config


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """--config.KEY=VALUE, --config.KEY VALUE and --config.FLAG (of a bool) taken out of argv, in order."""
    rest, overrides = [], []
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        match = re.match(r"--?config\.(.*)", argument, re.DOTALL)
        if not match:
            rest.append(argument)
        elif "=" in match[1]:
            overrides.append(match[1])
        elif match[1] in _BY_NAME and _BY_NAME[match[1]].type is bool:
            overrides.append(f"{match[1]}=true")
        elif position < len(argv):
            overrides.append(f"{match[1]}={argv[position]}")
            position += 1
        else:
            overrides.append(match[1])
    return rest, overrides


def _read(source: str, arg: str | None) -> tuple[Mapping[str, Any] | ConfigDict, str | None]:
    """What the config file says, and the workdir of a run whose config names none."""
    match = re.fullmatch(r"(.*\.py):(.*)", source) or re.fullmatch(r"(\w+):(.*)", source)
    if match:
        if arg is not None:
            raise ValueError(f"config {source!r} names an argument, and so does arg={arg!r}: give one")
        source, arg = match[1], match[2]
    path = Path(source)
    if not path.suffix and not path.exists():
        found = [folder / f"{source}.py" for folder in _config_folders() if (folder / f"{source}.py").is_file()]
        path = found[0] if found else path
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"config {source!r} not found: expected FILE.py, a config.json, or one of {_named_configs()}")
    if path.suffix == ".json":
        return _read_json(path, arg), None
    if path.suffix != ".py":
        raise ValueError(f"config {source!r}: expected a .py file or a config.json")
    run = path.stem if arg is None else f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.=-]+', '_', arg)}"
    return _run_file(path, arg), str(Path("runs") / run)


def _read_json(path: Path, arg: str | None) -> Mapping[str, Any]:
    if arg is not None:
        raise ValueError(f"config {path}: a JSON file takes no argument, got {arg!r}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"config {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected an object of keys, got {type(content).__name__}")
    return content


def _run_file(path: Path, arg: str | None) -> ConfigDict | Mapping[str, Any]:
    spec = importlib.util.spec_from_file_location(f"jaxalign_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("it defines no get_config(arg=None)")
        config = module.get_config() if arg is None else module.get_config(arg)
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"config {path}: {error}") from error
    if not isinstance(config, ConfigDict | Mapping):
        raise ValueError(f"config {path}: get_config returned {type(config).__name__}, expected a ConfigDict")
    return config


def _config_folders() -> list[Path]:
    return [Path("configs"), Path(__file__).resolve().parent.parent / "configs"]


def _named_configs() -> str:
    names = sorted({file.stem for folder in _config_folders() for file in folder.glob("*.py")})
    return ", ".join(names) or "the names in configs/"


@dataclasses.dataclass(frozen=True)
class Given:
    """What the check knows besides the config (see `validate`)."""

    n_devices: int | None = None
    dataset: bool = False
    eval_dataset: bool = False


def _validate(flat: dict[str, Any], problems: dict[str, str], given: Given) -> ConfigDict:
    """`problems`: those found so far, by key."""
    values = {key.name: key.default for key in KEYS}
    for name, value in flat.items():
        key = _BY_NAME.get(name)
        if key is None:
            problems[name] = _unknown(name, _nearest(name))
            continue
        try:
            values[name] = _coerce(key, value)
        except ValueError as error:
            problems[name] = str(error)
    config = _nest(values)
    # A key whose value is not what was meant, or that was written under another name, gets no second complaint.
    doubtful = {*problems, *(nearest for name in problems if name not in _BY_NAME for nearest in _nearest(name))}
    lines = list(problems.values())
    for names, problem in [*_contradictions(config, given), *_inert(config, given)]:
        if doubtful.isdisjoint(names):
            lines.append(problem)
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ValueError(f"the config has {count}:" + "".join(f"\n  {line}" for line in lines))
    return config


Problem = tuple[tuple[str, ...], str]
"""The keys that a problem is about, and its text."""


def _contradictions(c: ConfigDict, given: Given) -> Iterator[Problem]:
    """Keys that can't stand together, or that are missing beside others."""
    if (c.steps is None) == (c.epochs is None):
        state = "neither is" if c.steps is None else f"both are ({c.steps}, {c.epochs})"
        yield ("steps", "epochs"), f"steps, epochs: exactly one is to be set, but {state}"
    if c.workdir is None:
        yield ("workdir",), "workdir is missing: the folder that the run writes to"
    if (c.model.path is None) == (c.model.random is None):
        state = "neither is" if c.model.path is None else "both are"
        yield ("model.path", "model.random"), f"model.path, model.random: exactly one is to be set, but {state}"
    if c.model.random is not None and c.tokenizer.path is None:
        yield ("model.random", "tokenizer.path"), "tokenizer.path is missing: model.random has none of its own (bytes?)"
    if given.dataset and c.data.path is not None:
        yield ("data.path",), f"data.path is {c.data.path!r}, but a dataset is given as well: set it to None"
    eval_keys = ("data.eval.path", "data.eval.split", "data.eval.fraction")
    if given.eval_dataset and _names_eval(c):
        yield eval_keys, f"{', '.join(eval_keys)}: an eval_dataset is given as well, so none of them may be set"
    if not given.dataset and c.data.path is None:
        yield ("data.path",), "data.path is missing: the file, folder or hub id of the training rows"
    if c.data.eval.fraction and (c.data.eval.path or c.data.eval.split):
        yield (
            ("data.eval.fraction", "data.eval.path", "data.eval.split"),
            "data.eval.fraction holds out training rows, but data.eval.path or data.eval.split names others: set one",
        )
    if c.data.eval.split and not c.data.eval.path and c.data.eval.split == (c.data.split or "train"):
        yield ("data.eval.split", "data.split"), f"data.eval.split is the training split {c.data.eval.split!r}"
    buckets = list(c.data.buckets)
    if buckets and (buckets != sorted(set(buckets)) or buckets[-1] < c.max_length):
        text = f"data.buckets is {buckets}, expected ascending lengths, the last at least max_length = {c.max_length}"
        yield ("data.buckets", "max_length"), text
    if c.data.max_prompt_length is not None and c.data.max_prompt_length >= c.max_length:
        text = (
            f"data.max_prompt_length = {c.data.max_prompt_length} leaves no response below max_length = {c.max_length}"
        )
        yield ("data.max_prompt_length", "max_length"), text
    from jaxalign.data.formats import FORMATS

    if c.data.format not in ("auto", *FORMATS):
        text = f"data.format: got {c.data.format!r}, expected auto or one of {', '.join(FORMATS)}"
        yield ("data.format",), text
    yield from _batch_contradictions(c, given.n_devices)
    yield from _loss_contradictions(c)
    if c.reference.sync_every and c.reference.mode == "cached":
        text = "reference.sync_every moves the reference, but reference.mode=cached scores it once: take live"
        yield ("reference.sync_every", "reference.mode"), text
    if c.optim.warmup_steps and c.optim.warmup_ratio is not None:
        yield ("optim.warmup_steps", "optim.warmup_ratio"), "optim.warmup_steps and optim.warmup_ratio: set one"
    if c.steps is not None and c.optim.warmup_steps > c.steps:
        text = f"optim.warmup_steps = {c.optim.warmup_steps} is longer than the run's steps = {c.steps}"
        yield ("optim.warmup_steps", "steps"), text
    if _optimizer_options(c.optim.name) is None:
        from jaxalign.optim import OPTIMIZERS

        near = difflib.get_close_matches(c.optim.name, OPTIMIZERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield ("optim.name",), f"optim.name: got {c.optim.name!r}, expected one of {', '.join(OPTIMIZERS)}{hint}"
    yield from _best_contradictions(c, given)
    steps = c.log.profile_steps
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        yield ("log.profile_steps",), f"log.profile_steps is {steps}, expected (first, last)"
    for name, value in _flatten(c).items():
        if isinstance(value, str) and _SECRET.search(value):
            text = (
                f"{name} holds what looks like a secret, which has no place in a config: use the environment (HF_TOKEN)"
            )
            yield (name,), text


def _batch_contradictions(c: ConfigDict, n_devices: int | None) -> Iterator[Problem]:
    batch = ("batch_size", "gradient_accumulation_steps")
    splits = c.gradient_accumulation_steps
    if c.batch_size % splits:
        yield batch, f"batch_size = {c.batch_size} is no multiple of gradient_accumulation_steps = {splits}"
    axes = ("data", "fsdp", "tensor", "sequence")
    sizes = {axis: c.mesh[axis] for axis in axes}
    names = tuple(f"mesh.{axis}" for axis in axes)
    free = [axis for axis in axes if sizes[axis] == -1]
    for axis in axes:
        if sizes[axis] == 0:
            yield (f"mesh.{axis}",), f"mesh.{axis} is 0, expected a number of devices, or -1 for all that is left"
    if len(free) > 1:
        one, other = f"mesh.{free[0]}", f"mesh.{free[1]}"
        yield names, f"{one} and {other} are both -1 (all that is left): set one of them, e.g. {one}=1"
    if 0 in sizes.values() or len(free) > 1 or n_devices is None:
        return
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if n_devices % fixed or (not free and fixed != n_devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        text = f"mesh {shape} doesn't use {n_devices} devices exactly; -1 for one axis takes all that is left"
        yield names, text
        return
    for axis in free:
        sizes[axis] = n_devices // fixed
    shards = sizes["data"] * sizes["fsdp"]
    rows = 2 * c.batch_size // splits
    if rows % shards:
        text = (
            f"a micro-batch has {rows} rows (2 x batch_size {c.batch_size} / gradient_accumulation_steps {splits}), "
            f"no multiple of mesh.data x mesh.fsdp = {shards} devices"
        )
        yield (*batch, *names), text
    if c.eval.batch_size is not None and 2 * c.eval.batch_size % shards:
        text = f"eval.batch_size = {c.eval.batch_size} pairs, no multiple of mesh.data x mesh.fsdp = {shards} rows"
        yield ("eval.batch_size", *names), text
    from jaxalign.data.batching import default_buckets

    for length in c.data.buckets or default_buckets(c.max_length):
        if length % sizes["sequence"]:
            text = f"rows of {length} tokens don't split over mesh.sequence = {sizes['sequence']}: set data.buckets"
            yield ("max_length", "data.buckets", *names), text
            break


def _loss_contradictions(c: ConfigDict) -> Iterator[Problem]:
    terms = c.loss.name.split("+")
    unknown = [term for term in terms if _loss_options(term) is None]
    if unknown:
        from jaxalign.losses.preference import LOSSES

        near = difflib.get_close_matches(unknown[0], LOSSES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield ("loss.name",), f"loss.name: {unknown[0]!r} is none of {', '.join(LOSSES)}, or sft in a sum{hint}"
    elif terms == ["sft"]:
        yield ("loss.name",), "loss.name: sft is only a term of a sum here, such as sigmoid+sft"
    if len(set(terms)) != len(terms):
        yield ("loss.name",), f"loss.name = {c.loss.name!r} names a term twice: give it one weight"
    if len(terms) > 1 and c.loss.weights and len(c.loss.weights) != len(terms):
        text = f"loss.weights has {len(c.loss.weights)} numbers for the {len(terms)} terms of {c.loss.name!r}"
        yield ("loss.weights", "loss.name"), text


def _best_contradictions(c: ConfigDict, given: Given) -> Iterator[Problem]:
    best, stopping = c.checkpoint, c.early_stopping
    wanted = [("early_stopping.metric", stopping.metric, "early_stopping.mode", stopping.mode)]
    if c.checkpoint.keep_best:
        wanted.append(("checkpoint.best_metric", best.best_metric, "checkpoint.best_mode", best.best_mode))
        if c.checkpoint.best_metric is None:
            yield ("checkpoint.best_metric",), "checkpoint.keep_best needs checkpoint.best_metric, e.g. eval_loss"
    for metric_key, metric, mode_key, mode in wanted:
        if metric is None:
            continue
        if not metric.startswith("eval_"):
            yield (metric_key,), f"{metric_key} is {metric!r}, expected a metric of the evaluation: eval_..."
        if not _names_eval(c) and not given.eval_dataset:
            yield (metric_key,), f"{metric_key} needs data.eval.path, data.eval.split or data.eval.fraction"
        elif not c.eval.every:
            yield (metric_key, "eval.every"), f"{metric_key} needs evaluations on the way: eval.every is 0"
        if mode is None:
            text = f"{mode_key} is missing: is the best {metric} the largest (max) or smallest (min)?"
            yield (metric_key, mode_key), text
    if c.export.enabled and c.export.step == "best" and not c.checkpoint.keep_best:
        yield ("export.step", "checkpoint.keep_best"), "export.step=best needs checkpoint.keep_best of at least 1"


def _inert(c: ConfigDict, given: Given) -> Iterator[Problem]:
    """Keys away from their default that change nothing, given the others."""
    terms = [options for options in map(_loss_options, c.loss.name.split("+")) if options is not None]
    loss_options = frozenset[str]().union(*terms)
    optimizer_options = _optimizer_options(c.optim.name)
    for key in KEYS:
        section, _, field = key.name.rpartition(".")
        value = _get(c, key.name)
        if value == key.default:
            continue
        why = ""
        if section == "loss" and field not in ("name", "weights") and terms and field not in loss_options:
            why = f"loss {c.loss.name!r} doesn't take it"
        elif key.name == "loss.weights" and "+" not in c.loss.name:
            why = f"loss.name = {c.loss.name!r} has one term"
        elif key.name in _OPTIMIZER_KEYS and optimizer_options is not None and field not in optimizer_options:
            why = f"optimizer {c.optim.name!r} doesn't take it"
        elif key.name == "optim.weight_decay" and c.optim.name == "adam":
            why = "optimizer 'adam' has no decay; adamw is adam with it"
        elif key.name == "optim.final_ratio" and c.optim.schedule == "constant":
            why = "optim.schedule is constant"
        elif key.name == "reference.sync_alpha" and not c.reference.sync_every:
            why = "reference.sync_every is 0"
        elif key.name in ("checkpoint.best_metric", "checkpoint.best_mode") and not c.checkpoint.keep_best:
            why = "checkpoint.keep_best is 0"
        elif section == "eval" and not _names_eval(c) and not given.eval_dataset:
            why = "there is no evaluation data (data.eval.path, data.eval.split or data.eval.fraction)"
        elif section == "samples" and field != "prompts" and not c.samples.prompts:
            why = "samples.prompts is 0"
        elif key.name in ("early_stopping.patience", "early_stopping.mode") and c.early_stopping.metric is None:
            why = "early_stopping.metric is None"
        elif section == "export" and field != "enabled" and not c.export.enabled:
            why = "export.enabled is false"
        if why:
            yield (key.name,), f"{key.name} = {value!r} has no effect: {why}"


_OPTIMIZER_KEYS = ("optim.b1", "optim.b2", "optim.eps", "optim.momentum", "optim.moments_dtype")


def _names_eval(c: ConfigDict) -> bool:
    return bool(c.data.eval.path or c.data.eval.split or c.data.eval.fraction)


def _loss_options(name: str) -> frozenset[str] | None:
    """The keywords that a term of loss.name takes; None for a name that doesn't exist."""
    if name == "sft":
        return frozenset()
    from jaxalign.losses.preference import LOSSES

    return frozenset(LOSSES[name].options) if name in LOSSES else None


def _optimizer_options(name: str) -> frozenset[str] | None:
    """The keywords of `optim.` that an optimizer takes; None for a name that doesn't exist."""
    from jaxalign import optim

    return frozenset(optim.options(name)) if name in optim.OPTIMIZERS else None


def _nearest(name: str) -> list[str]:
    """Keys that `name` may have been meant for: similar as a whole, or with the same last part or its initials."""
    close = difflib.get_close_matches(name, _BY_NAME, 1, 0.8)
    last = name.rpartition(".")[2]
    same_last = []
    for key in _BY_NAME:
        field = key.rpartition(".")[2]
        if last in (field, "".join(word[:1] for word in field.split("_"))):
            same_last.append(key)
    return close or same_last[:1] or difflib.get_close_matches(name, _BY_NAME, 1, 0.5)


def _unknown(name: str, nearest: list[str]) -> str:
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"there is no key {name!r}{hint} (--help_config lists all)"


def _override(flat: dict[str, Any], name: str, text: str) -> dict[str, Any]:
    """`flat` with one key set from text. Fields of a dict key may be set one by one: model.random.hidden_size=64."""
    parent, _, field = name.rpartition(".")
    if name not in _BY_NAME and parent in _BY_NAME and dict in _members(_BY_NAME[parent].type):
        return {**flat, parent: {**(flat.get(parent) or {}), field: _literal(text)}}
    if name not in _BY_NAME:
        raise ValueError(_unknown(name, _nearest(name)))
    return {**flat, name: _from_text(_BY_NAME[name], text)}


def _from_text(key: Key, text: str) -> Any:
    members = _members(key.type)
    lowered = text.strip().lower()
    if type(None) in members and lowered in ("none", "null", ""):
        return None
    if bool in members and lowered in ("true", "false"):
        return lowered == "true"
    for member in members:
        if member in (int, float):
            try:
                return member(text)
            except ValueError:
                continue
        origin = typing.get_origin(member)
        if origin is tuple and text[:1] in ("(", "["):
            return _literal(text)
        if origin is tuple:
            item = typing.get_args(member)[0]
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return [_from_text(Key(key.name, None, item, ""), part) for part in parts]
        if member is dict:
            return _literal(text)
        if member is str:
            return text
    raise ValueError(f"{key.name}: got {text!r}, expected {_type_name(key.type)}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(key: Key, value: Any) -> Any:
    """The value as the key's type has it, or an error that names key, value and what was expected."""
    fits, result = _fit(value, key.type)
    if not fits:
        raise ValueError(f"{key.name}: got {value!r} ({type(value).__name__}), expected {_type_name(key.type)}")
    if key.choices and result is not None and result not in key.choices:
        near = difflib.get_close_matches(result, key.choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key.name}: got {result!r}, expected one of {', '.join(key.choices)}{hint}")
    for number in result if isinstance(result, tuple) else (result,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not _in_range(number, key.range):
            interval = key.range or "(-inf, inf)"
            raise ValueError(f"{key.name}: got {value!r}, expected {_type_name(key.type)} in {interval}")
    return result


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value as that type has it (int -> float, list -> tuple)."""
    for member in _members(kind):
        if typing.get_origin(member) is tuple and isinstance(value, list | tuple):
            items = [_fit(item, typing.get_args(member)[0]) for item in value]
            if all(fits for fits, _ in items):
                return True, tuple(item for _, item in items)
        elif member is dict and isinstance(value, Mapping | ConfigDict):
            return True, _plain(value)
        elif member is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True, float(value)
        elif member in (int, str, bool, type(None)) and type(value) is member:
            return True, value
    return False, None


def _in_range(number: float, interval: str) -> bool:
    if not interval:
        return math.isfinite(number)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _type_name(kind: Any) -> str:
    names = {type(None): "None", tuple[int, ...]: "(int, ...)", tuple[float, ...]: "(float, ...)",
             tuple[str, ...]: "(str, ...)"}  # fmt: skip
    return " or ".join(names.get(member) or member.__name__ for member in _members(kind))


def _flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value}; a key whose type is dict keeps its dict, an empty section has no entry."""
    flat: dict[str, Any] = {}
    for field, value in config.items():
        name = f"{prefix}{field}"
        if isinstance(value, Mapping | ConfigDict) and name not in _BY_NAME:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> ConfigDict:
    """The ConfigDict of {"a.b": value}. Not type-safe: None -> number and int -> tuple are judged by `_coerce`."""
    config = ConfigDict(type_safe=False)
    for name, value in flat.items():
        *sections, field = name.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ConfigDict(type_safe=False)
            node = node[section]
        node[field] = _plain(value)
    return config


def _get(config: ConfigDict, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = node[part]
    return _plain(node)


def _plain(value: Any) -> Any:
    """Without ConfigDicts and lists, so that values compare by content."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value


if __name__ == "__main__":
    print(describe())
