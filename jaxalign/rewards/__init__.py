"""Rewards of completions: those that come with the package, functions of the user's, and reward models.

A reward is `f(prompts, completions, **columns) -> list[float | None]`, TRL's signature: the columns of the data arrive
as lists with an entry for each completion, `completion_ids` (the sampled tokens) with them; None says "does not apply".
It may be an async function. What it prints is not shown, unless it fails. Nothing that a model wrote is run here.
"""

import contextlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxalign import user_code
from jaxalign.messages import did_you_mean, listed

if TYPE_CHECKING:  # this is imported in the functions' processes too, which are to start quickly
    from jaxalign.rewards.model import RewardModel
    from jaxalign.rewards.scores import Rewards

SHIPPED = {
    "gsm8k": ("math", "gsm8k"),
    "math": ("math", "accuracy"),
    "number": ("math", "number"),
    "number_flexible": ("math", "number_flexible"),
    "format": ("format", "format"),
    "tags": ("format", "tags"),
    "length": ("format", "length"),
    "overlong": ("format", "overlong"),
    "repetition": ("format", "repetition"),
    "keyword": ("format", "keyword"),
}
"""Name -> (module of this package, function). Each scores a completion by itself."""

MODEL = "model:"
"""What the name of a reward model begins with; a path follows."""


def name_of(reward: str) -> str:
    """What metrics call a reward: the function's name; a shipped one's, or a model's path, as it was given."""
    return reward if reward.startswith(MODEL) else reward.replace(":", ".").rpartition(".")[2]


def load(
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    config_folder: str | Path | None = None,
    columns: Collection[str] | None = None,
    tokenizer: Any = None,
    mesh: Any = None,
    timeout: float = 60.0,
    workers: int = 1,
    memory_gb: float = 4.0,
    max_error_rate: float = 0.5,
) -> "Rewards":
    """Loads rewards: starts the processes that functions run in, and waits until each has loaded its own.

    Args:
      names: of SHIPPED, `package.module.function`, `FILE.function`, `path/file.py:function`, or `model:PATH`.
      options: further keywords of every call, by reward, named as here or as in metrics.
      config_folder: where `FILE.py` is looked for first.
      columns: of the data; None: not known.
      tokenizer: the policy's; models need it.
      mesh: that models are laid on.
      timeout: seconds that a call of one function may take.
      workers: processes that share a shipped reward's completions. Another's function sees all in one call.
      memory_gb: address space of each process, in GiB, what is imported included.
      max_error_rate: the share of completions that a function may fail on.

    Raises:
      ValueError: a reward can't be loaded, asks for a column that is not there, or does not take an option; or two
        have one name.
    """
    from jaxalign.rewards.run import Worker
    from jaxalign.rewards.scores import Rewards

    shown = [name_of(name) for name in names]
    for n, name in enumerate(shown):
        if name in shown[:n]:
            raise ValueError(f"rewards.functions: {names[n]!r} is called {name} in metrics, as another is; rename it")
    given = {name_of(name): dict(of_one) for name, of_one in (options or {}).items()}
    for name in given:
        if name not in shown:
            raise ValueError(f"rewards.options: there is no reward {name!r}{did_you_mean(name, shown)}")
    for name in names:
        if name not in SHIPPED and not name.startswith(MODEL) and not user_code.is_function(name):
            raise ValueError(
                f"rewards.functions: there is no {name!r}{did_you_mean(name, SHIPPED)}; expected FILE.function, "
                f"package.module.function, {MODEL}PATH, or one of {listed([*SHIPPED])}"
            )
    scorers: dict[str, Any] = {}
    with contextlib.ExitStack() as started:
        for label, name in zip(shown, names, strict=True):
            if name.startswith(MODEL):
                scorers[label] = _model(name, given.get(label, {}), tokenizer, mesh)
                continue
            if name in SHIPPED:
                function = ".".join((__name__, *SHIPPED[name]))
            else:
                function = name if config_folder is None else user_code.beside(name, Path(config_folder))
            scorers[label] = []
            for _ in range(workers if name in SHIPPED else 1):
                worker = Worker(label, function, given.get(label, {}), timeout=timeout, memory_gb=memory_gb)
                started.callback(worker.close)
                scorers[label].append(worker)
        for label, name in zip(shown, names, strict=True):
            for worker in () if name.startswith(MODEL) else scorers[label]:
                worker.check(columns, dry_call=name in SHIPPED)
        started.pop_all()
    return Rewards(scorers, max_error_rate=max_error_rate)


def _model(name: str, options: Mapping[str, Any], tokenizer: Any, mesh: Any) -> "RewardModel":
    from jaxalign.rewards import model

    parameters = inspect.signature(model.load).parameters.values()
    takes = [p.name for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY and p.name != "mesh"]
    for option in options:
        if option not in takes:
            raise ValueError(
                f"rewards.options: {name} has no {option!r}{did_you_mean(option, takes)}; it has {listed(takes)}"
            )
    return model.load(name.removeprefix(MODEL), tokenizer, mesh=mesh, **options)
