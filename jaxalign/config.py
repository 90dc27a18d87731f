"""The documented base config of a run, and the strict check of every config before anything expensive begins.

`config_keys.KEYS` is the one place where every key stands with its default, its type and what it does; `base`, the
check, the command line and `python -m jaxalign.config` (which prints the table) derive from it. A config file defines
`get_config(arg=None)` that starts from `base()` and sets keys; a run's config.json is a config file as well. Unknown,
ill-typed, contradictory and inert keys (set, but without effect given the others) are errors, all listed at once.

This module never imports jax; the check of the loss's and the optimizer's options imports the module that defines them.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from jaxalign.config_keys import (
    BY_NAME,
    KEYS,
    coerce,
    flatten,
    from_text,
    literal,
    members,
    nearest,
    nest,
    type_name,
    unknown,
)
from jaxalign.config_keys import plain as plain
from jaxalign.config_rules import Given, contradictions, inert
from jaxalign.config_rules import head as head  # the rest of the program asks config for these
from jaxalign.config_rules import is_lora as is_lora
from jaxalign.config_rules import kind as kind
from jaxalign.config_rules import loss_arguments as loss_arguments
from jaxalign.config_rules import needs_reference as needs_reference
from jaxalign.user_code import beside, is_function

RESUME_MAY_CHANGE = (
    "workdir", "steps", "epochs", "resume", "compilation_cache", "watchdog_minutes", "log", "eval", "samples",
    "checkpoint", "mesh", "export", "early_stopping", "data.cache_dir", "data.workers", "rollout.show_every",
    "rewards.timeout", "rewards.workers", "rewards.memory_gb", "rewards.max_error_rate",
)  # fmt: skip
"""Keys, or first parts of keys, that a resumed run may change; any other change needs resume="force"."""

_NOT_SAVED = ("resume",)  # says how one start was asked for, not what the run is


def base() -> ConfigDict:
    """A new config with every key at its default. Types are checked by `validate`, not at assignment."""
    return nest({key.name: key.default for key in KEYS})


def describe() -> str:
    """The table of all keys: name, default, type or choices, range, meaning. One line each, a blank line a section."""
    lines: list[str] = []
    section = ""
    for key in KEYS:
        head, dot, _ = key.name.partition(".")
        if dot and head != section:
            lines.append("")
            section = head
        kind = "|".join(key.choices) if key.choices else f"{type_name(key.type)} {key.range}".strip()
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
    given, default_workdir, folder = _read(source, arg)
    problems: dict[str, str] = {}
    flat = flatten(given)
    for name in ("data.format", "data.weight", "rollout.function"):
        if is_function(flat.get(name)):
            flat[name] = beside(flat[name], folder)
    if rewards := flat.get("rewards.functions"):
        names = (rewards,) if isinstance(rewards, str) else rewards
        flat["rewards.functions"] = tuple(beside(name, folder) if is_function(name) else name for name in names)
    template = flat.get("tokenizer.chat_template")
    if isinstance(template, str) and "{" not in template and Path(template).expanduser().is_file():
        flat["tokenizer.chat_template"] = Path(template).expanduser().read_text()  # so that the run's config has it
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
    return _validate(flatten(config), {}, given)


def to_json(config: ConfigDict | Mapping[str, Any]) -> str:
    """A config as text that `load` reads again, equal in every key but `resume` (which is said at each start)."""
    flat = flatten(config)
    ordered = {key.name: flat[key.name] for key in KEYS if key.name in flat and key.name not in _NOT_SAVED}
    return json.dumps(nest(ordered).to_dict(), indent=2) + "\n"


def diff(old: Mapping[str, Any] | ConfigDict, new: Mapping[str, Any] | ConfigDict) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) for every key that differs; a key that one side lacks stands at its default."""
    defaults = {key.name: key.default for key in KEYS}
    before, after = {**defaults, **flatten(old)}, {**defaults, **flatten(new)}
    names = [*defaults, *sorted((before.keys() | after.keys()) - defaults.keys())]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def check_resume(
    old: Mapping[str, Any] | ConfigDict, new: Mapping[str, Any] | ConfigDict
) -> list[tuple[str, Any, Any]]:
    """What changed since the run in `workdir` began, if a resumed run may change it or new.resume is "force".

    Raises:
      ValueError: keys that decide what the run computes differ; each is listed as old -> new.
    """
    changed = diff(old, new)
    free = tuple(f"{name}." for name in RESUME_MAY_CHANGE)
    refused = [change for change in changed if not f"{change[0]}.".startswith(free)]
    if refused and new.get("resume", "auto") != "force":
        lines = "".join(f"\n  {name}: {before!r} -> {after!r}" for name, before, after in refused)
        raise ValueError(
            f"the run in {new.get('workdir')} was started with another config:{lines}\nTake another workdir, set the "
            "keys back, or go on with the new values by --resume=force"
        )
    return changed


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --config, --print_config, --help_config, --resume and --help on `values`, once."""
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
    flags.DEFINE_enum("resume", None, BY_NAME["resume"].choices, "Short for --config.resume.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print the flags and stop.", flag_values=values)


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
        if values.help:
            print(f"{sys.modules['__main__'].__doc__}\n{values.get_help()}")
            raise SystemExit(0)
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
        elif match[1] in BY_NAME and BY_NAME[match[1]].type is bool:
            overrides.append(f"{match[1]}=true")
        elif position < len(argv):
            overrides.append(f"{match[1]}={argv[position]}")
            position += 1
        else:
            overrides.append(match[1])
    return rest, overrides


def _read(source: str, arg: str | None) -> tuple[Mapping[str, Any] | ConfigDict, str | None, Path]:
    """What the config file says, the workdir of a run whose config names none, and the folder that the file is in."""
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
        return _read_json(path, arg), None, path.parent
    if path.suffix != ".py":
        raise ValueError(f"config {source!r}: expected a .py file or a config.json")
    run = path.stem if arg is None else f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.=-]+', '_', arg)}"
    return _run_file(path, arg), str(Path("runs") / run), path.parent


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
    return [Path("configs"), Path(__file__).parent / "configs"]  # the latter ship with the package


def _named_configs() -> str:
    names = sorted({file.stem for folder in _config_folders() for file in folder.glob("*.py")})
    return ", ".join(names) or "the names in configs/"


def _validate(flat: dict[str, Any], problems: dict[str, str], given: Given) -> ConfigDict:
    """`problems`: those found so far, by key."""
    values = {key.name: key.default for key in KEYS}
    for name, value in flat.items():
        key = BY_NAME.get(name)
        if key is None:
            problems[name] = unknown(name)
            continue
        try:
            values[name] = coerce(key, value)
        except ValueError as error:
            problems[name] = str(error)
    config = nest(values)
    # A key whose value is not what was meant, or that was written under another name, gets no second complaint.
    doubtful = {*problems, *(key for name in problems if name not in BY_NAME for key in nearest(name))}
    lines = list(problems.values())
    for names, problem in [*contradictions(config, given), *inert(config, given)]:
        if doubtful.isdisjoint(names):
            lines.append(problem)
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ValueError(f"the config has {count}:" + "".join(f"\n  {line}" for line in lines))
    return config


def _override(flat: dict[str, Any], name: str, text: str) -> dict[str, Any]:
    """`flat` with one key set from text. Fields of a dict key may be set one by one: model.random.hidden_size=64."""
    parent, _, field = name.rpartition(".")
    if name not in BY_NAME and parent in BY_NAME and dict in members(BY_NAME[parent].type):
        return {**flat, parent: {**(flat.get(parent) or {}), field: literal(text)}}
    if name not in BY_NAME:
        raise ValueError(unknown(name))
    return {**flat, name: from_text(BY_NAME[name], text)}


if __name__ == "__main__":
    print(describe())
