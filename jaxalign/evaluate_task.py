"""How well a model does a task: `evaluate --task=FILE --reward=f`, without a config. See `evaluate`.

The answers are sampled and rewarded as a run does it (`actor.Actor`), with all of the model's context to themselves.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from jaxalign import decoding, generate, rewards, rollout, sharding, tasks, user_code
from jaxalign.actor import Actor
from jaxalign.data import sources
from jaxalign.data.rows import to_json

LIMITS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_new": 0}


def evaluate_task(
    model: str,
    task: Any,
    reward: Sequence[str],
    *,
    step: str | None = None,
    adapter: str | None = None,
    split: str | None = None,
    name: str | None = None,
    format: str = "auto",
    max_rows: int | None = None,
    n: int = 1,
    temperature: float | None = None,
    limits: Mapping[str, Any] | None = None,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    threshold: float = 1.0,
    reward_options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    slots: int = 32,
    tensor: int = 1,
    completions: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, float]:
    """Answers to the prompts of a task and what they come to. On several processes all call it alike.

    Args:
      model, step, adapter: see `generate.load`.
      task, split, name: rows, see `sources.read_rows`; a prompt is what any format gives, and the other columns go to
        the rewards.
      reward: see `rewards.load`; FILE.function is looked for here, as is a `format` that is a function.
      max_rows: the first rows only.
      n: answers to each prompt. If there are several, a greedy one is made beside them.
      temperature: of the n; None: 0 for one, 1 for several.
      limits: other keywords of `sampling.make_limits`, such as top_p.
      max_new_tokens: of an answer.
      stop: texts that end one.
      threshold: the value of a reward from which on an answer is right.
      reward_options: keywords of the rewards by name.
      slots: answers that are decoded at once. What is drawn depends on seed, n, slots and how many rows there are.
      tensor: devices that the model is split over; the prompts are split over the others.
      completions: a file for a JSON line for each answer (`tasks.records`, and its temperature).
      say: hears of progress.

    Returns:
      `tasks.summary` of each reward under its name; `dropped` rows; of the n, or the greedy one if there is no other,
      completions/mean_length and completions/clipped_ratio, the share that a limit ended.

    Raises:
      ValueError: something is not there or does not go together.
    """
    if temperature is None:
        temperature = 0.0 if n == 1 else 1.0
    if n > 1 and temperature == 0:
        raise ValueError(f"n={n} greedy answers to a prompt are all equal: set a temperature above 0, or n to 1")
    mesh = sharding.make_mesh(data=-1, tensor=tensor)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding.use_mesh(mesh))
        cfg, params, tokenizer, ends = generate.load(model, step, mesh, adapter=adapter)
        say(f"read {model}")
        prepared = sources.prepare(
            task,
            tokenizer=tokenizer,
            max_length=cfg.max_position_embeddings,
            split=split,
            name=name,
            format=user_code.beside(format, Path.cwd()) if user_code.is_function(format) else format,
            limit=max_rows,
            kind="prompts",
        )
        scores = rewards.load(
            reward,
            reward_options,
            config_folder=Path.cwd(),
            columns=prepared.column_names,
            tokenizer=tokenizer,
            mesh=mesh,
        )
        stack.callback(scores.close)
        actor = Actor(
            cfg,
            tokenizer,
            scores,
            limits={**LIMITS, **(limits or {})},
            stop=tuple(stop),
            max_length=cfg.max_position_embeddings,
            max_completion_length=max_new_tokens,
            slots=slots,
            max_prompt_tokens=int(prepared.prompt_lengths.max()),
            ends=tuple(ends),
        )
        params = decoding.view(cfg, params)
        file = None
        if completions is not None and jax.process_index() == 0:
            file = stack.enter_context(open(Path(completions).expanduser(), "wb"))

        def answers(n: int, temperature: float) -> tasks.Answers:
            began = time.monotonic()

            def tell(part: tasks.Answers) -> None:
                if file is not None:
                    for record in tasks.records(part, prepared, scores.names):
                        file.write(to_json({**record, "temperature": temperature}) + b"\n")
                    file.flush()
                done, means = int(part.places[-1]) + 1, _means(part.rewards)
                told = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(scores.names, means, strict=True))
                what = f"{n} {'greedy' if temperature == 0 else 'sampled'} answers a prompt"
                seconds = f"{time.monotonic() - began:.0f} s"
                say(f"{what}: {done:,} of {len(prepared):,} prompts in {seconds}, the last {len(part.places)} {told}")

            return tasks.answer(actor, params, prepared, n=n, temperature=temperature, seed=seed, tell=tell)

        found = {"dropped": float(sum(prepared.meta["dropped"].values()))}
        greedy = answers(1, 0.0) if n > 1 else None
        sampled = answers(n, temperature)
        for f, name in enumerate(scores.names):
            if greedy is not None:
                one = tasks.summary(greedy.rewards[..., f], greedy.failed[..., f], threshold=threshold, name=name)
                found |= {key: value for key, value in one.items() if key.startswith(f"{name}/accuracy")}
            found |= tasks.summary(sampled.rewards[..., f], sampled.failed[..., f], threshold=threshold, name=name)
        lengths = rollout.lengths(sampled.tokens.ravel(), ~sampled.finished.ravel())
        return found | {name: lengths[name] for name in ("completions/mean_length", "completions/clipped_ratio")}


def _means(rewards_PNF: np.ndarray) -> list[float]:
    """The mean of each reward where there is one."""
    values_FC = np.moveaxis(rewards_PNF, -1, 0).reshape(rewards_PNF.shape[-1], -1)
    return [float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else math.nan for values in values_FC]


def show(found: Mapping[str, float]) -> str:
    """Metrics as lines, those that are means of prompts with standard error and 95% interval."""
    lines = []
    for name, value in found.items():
        if f"{name}_low" in found:
            bounds = f"[{found[f'{name}_low']:.4f}, {found[f'{name}_high']:.4f}]"
            lines.append(f"{name:32} {value:.4f} +- {found[f'{name}_se']:.4f} {bounds}")
        elif not name.endswith(("_se", "_low", "_high")):
            lines.append(f"{name:32} {value:g}")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `evaluate` that go with --task."""
    text, number, share = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("task", None, "Rows whose prompts are answered, and whose columns the rewards get.", values)
    judges = "What judges the answers: names of jaxalign.rewards, FILE.function, model:PATH."
    flags.DEFINE_list("reward", [], judges, values)
    text("reward_options", None, 'Keywords of rewards as JSON: {"gsm8k": {"method": "flexible"}}.', values)
    text("adapter", None, "PEFT folder with adapters for --model.", values)
    text("split", None, "Split of a data set that has several.", values)
    text("name", None, "Configuration (subset) of a hub data set.", values)
    text("format", "auto", "How a row of the task is read: a name as data.format has it, or FILE.function.", values)
    text("completions", None, "File for a JSON line for each answer.", values)
    flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be given several times.", values)
    number("max_rows", None, "The first rows of the task only.", 1, flag_values=values)
    number(
        "n", 1, "Answers to each prompt. Several: mean@n and pass@k, and a greedy one beside.", 1, flag_values=values
    )
    share("temperature", None, "0: greedy. By default 0 for one answer, 1 for several.", 0.0, flag_values=values)
    number("top_k", 0, "Sample from the k likeliest tokens; 0: all.", 0, flag_values=values)
    share("top_p", 1.0, "Sample from the likeliest tokens that have this probability together.", 0.0, 1.0, values)
    number("max_new_tokens", 512, "Tokens of an answer at most.", 1, flag_values=values)
    share("threshold", 1.0, "The value of a reward from which on an answer is right.", flag_values=values)
    number("seed", 0, "Seed of sampling.", 0, flag_values=values)
    number("slots", 32, "Answers decoded at once.", 1, flag_values=values)
    number("tensor", 1, "Devices that the model is split over.", 1, flag_values=values)


def run(values: flags.FlagValues, say: Callable[[str], object]) -> dict[str, float]:
    """What the command line asks for."""
    if values.model is None or not values.reward:
        raise ValueError("--task goes with --model=PATH and --reward=NAME[,NAME]: what is to answer, and who judges it")
    if values.completions:
        generate.check_writable("--completions", values.completions)
    try:
        options = values.reward_options and json.loads(values.reward_options)
    except ValueError as error:
        raise ValueError(f"--reward_options={values.reward_options} is not JSON: {error}") from error
    same = ("adapter", "split", "name", "format", "max_rows", "n", "temperature", "max_new_tokens", "stop", "threshold",
            "seed", "slots", "tensor", "completions")  # fmt: skip
    given: dict[str, Any] = {name: values[name].value for name in same}
    given["step"] = None if values.step == "last" else values.step
    given["limits"] = {"top_k": values.top_k, "top_p": values.top_p}
    return evaluate_task(values.model, values.task, values.reward, reward_options=options, say=say, **given)
