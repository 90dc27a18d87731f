"""Any model on held-out rows: `python -m jaxalign.evaluate --model=my-model --config=configs/dpo_smollm2.py`; or at a
task: `python -m jaxalign.evaluate --model=my-model --task=questions.jsonl --reward=gsm8k --n=8`.

    --model=PATH      Hugging Face folder, .gguf file, hub id, package:NAME, or the folder of a run (with --step)
    --config=...      whose evaluation rows, template, lengths, loss and mesh are taken; of a run by default its own
    --data=FILE       other rows than the config's
    --reference=PATH  the model that rewards are measured against; by default the config's: what its policy begins as
    --own=N           N completions by the model itself: how much likelier its own words are to it than the data's
    --json, --out     one JSON object on stdout; the same to a file

    --task=FILE       rows whose prompts the model answers, and whose columns judge the answers, without a config
    --reward=F[,G]    a name of jaxalign.rewards (gsm8k, math, ...), FILE.function in TRL's signature, or model:PATH
    --n=8             answers to each prompt: mean@8 and pass@2, 4, 8; without it one greedy answer: accuracy
    --completions=... a JSON line for each answer, with its rewards

The loss says what is measured: of preferences reward accuracy, margin and the responses' perplexities; of labelled
responses the margin between the kinds and how well rewards tell them apart; of chats and texts the perplexity; of a
reward model its accuracy and margin; of attribute scores error and correlation, one by one. All have a standard error
and a 95% interval. The numbers are those that training logs for the same weights, with more intervals. A reference that
moved while a run trained is not used: rewards are measured against the one that it began with. With several processes
start it on all hosts alike.
"""

import contextlib
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxalign import (
    build,
    checkpoint,
    evals,
    evaluate_task,
    export,
    hf,
    hosts,
    metrics,
    models,
    paths,
    run_folder,
    sampling,
    sharding,
    train,
)
from jaxalign import config as config_lib
from jaxalign.metrics import Z

OWN_SLOTS = 32  # completions that are sampled at once


def evaluate(
    model: str,
    config: ConfigDict | Mapping[str, Any],
    *,
    step: str | int = "last",
    reference: str | None = None,
    own: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """The metrics of `model` over the evaluation rows of `config`, under the names that training logs.

    Args:
      model: see `hf.resolve`; or the folder of a run.
      config: as `config.load` gives it, with evaluation rows.
      step: of a run: "last", "best" or a number.
      reference: see `hf.resolve`; None: the config's reference, else its model (of a run: what the run began as).
      own: completions that the model samples of the first rows' prompts, see `shift`.
      say: hears of progress.

    Returns:
      `evals.summarize`'s metrics and `details`; each mean and share with `..._se`, `..._low` and `..._high`.

    Raises:
      ValueError: model, reference, rows, lengths and mesh do not go together, or something is not there.
    """
    config = _of_model(config_lib.validate(config, n_devices=jax.device_count()), model, reference)
    train.use_compilation_cache(config.compilation_cache)
    if own and evals.form_of(config_lib.kind(config), config_lib.head(config)) not in ANSWERS:
        raise ValueError(f"--own={own}: the rows of the loss {config.loss.name!r} hold no answers to compare with")
    data = _load_rows(config)
    config.eval.max_rows = None  # they are cut to it
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with sharding.use_mesh(mesh), contextlib.closing(build.Run(config, mesh, data)) as run:
        run.score_reference(say)
        run.cached_reference = True  # no step will ask the reference: it makes room for the model
        run.release()
        params = _load(model, run, step)
        if run.rollouts is not None:
            return with_intervals(evals.evaluate(run, run.state._replace(params=params)))
        batches = run.eval_batches(run.state._replace(params=params))
        examples = evals.collect(run.examples, params, batches, run.base)
        form = evals.form(run.objective)
        found = evals.summarize(run.objective, examples) | details(form, examples, run.cfg.labels)
        if own:
            found |= shift(run, params, ANSWERS[form](examples), own)
    return with_intervals(found)


def details(form: str, examples: Mapping[str, np.ndarray], labels: Sequence[str] = ()) -> dict[str, float]:
    """What an evaluation tells beyond what training logs, of `examples` of a form of `evals.SUMMARIES`.

    eval_perplexity/chosen and /rejected (of labelled responses desirable and undesirable ones); eval_rewards/auc, how
    often a desirable response has a larger reward than an undesirable one; of attribute models eval_mse/NAME and
    eval_correlation/NAME (Pearson's) with the scores that people gave. `labels` are the attributes' names.
    """
    found: dict[str, float] = {}
    if form in ("pairs", "triples"):
        for side in ("chosen", "rejected"):
            rate = evals.token_mean(examples[f"nll/{side}"], examples[f"{side}_tokens"])
            found |= evals.perplexity(f"eval_perplexity/{side}", *rate)
    elif form in ("labelled", "singles"):
        label = examples["label"] > 0.5
        for side, is_side in (("chosen", label), ("rejected", ~label)):
            if is_side.any():
                rate = evals.token_mean(-examples["logps"][is_side], examples["tokens"][is_side])
                found |= evals.perplexity(f"eval_perplexity/{side}", *rate)
        value, error = auc(examples["rewards"][label], examples["rewards"][~label])
        found |= {"eval_rewards/auc": value, "eval_rewards/auc_se": error}
    elif form == "chats":
        value, error = evals.token_mean(examples["correct"], examples["tokens"])
        found |= {"eval_mean_token_accuracy": value, "eval_mean_token_accuracy_se": error}
    elif form == "scored":
        values, targets = examples["values"], examples["targets"]
        for k, name in enumerate(labels or map(str, range(values.shape[1]))):
            known = ~np.isnan(targets[:, k])
            mean, error = metrics.mean_se(np.square(values[known, k] - targets[known, k]))
            found |= {f"eval_mse/{name}": mean, f"eval_mse/{name}_se": error}
            found |= correlation(f"eval_correlation/{name}", values[known, k], targets[known, k])
    return found


ANSWERS: Mapping[str, Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]] = {
    "pairs": lambda examples: (-examples["nll/chosen"], examples["chosen_tokens"]),
    "triples": lambda examples: (-examples["nll/gold"], examples["gold_tokens"]),
    "labelled": lambda examples: (examples["logps"], examples["tokens"]),
    "singles": lambda examples: (examples["logps"], examples["tokens"]),
    "chats": lambda examples: (-examples["nll"], examples["tokens"]),
}
"""Form of examples -> sums of the log-probs of the data's answers (of pairs the chosen ones), and their tokens."""


def shift(run: build.Run, params: models.Params, answers: tuple[np.ndarray, np.ndarray], own: int) -> dict[str, float]:
    """How far the data's answers are from what the model would say itself: what off-policy training has to bridge.

    eval_logps/data_per_token: the mean log-prob in nats of a token of the `answers` (see ANSWERS);
    eval_logps/own_per_token: that of a token of `own` completions which the model samples at temperature 1, one of each
    of the first rows' prompts; eval_shift: how much that is above the data's, 0 where the data is the model's own.
    """
    data, tokenizer, length = run.data.train, run.data.tokenizer, run.config.max_length
    prompts = [data.prompt(i) for i in range(min(own, len(data)))]
    samples = sampling.sample(
        run.cfg,
        run.whole(params),
        prompts,
        sampling.request_keys(run.config.seed, np.arange(len(prompts))),
        sampling.make_limits(
            len(prompts),
            max_new=[length - len(ids) for ids in prompts],
            stop_ids=hf.stop_ids(run.cfg, tokenizer, run.config.model.path),
        ),
        max_new_tokens=length - min(map(len, prompts)),
        slots=min(len(prompts), OWN_SLOTS),
        on_progress=lambda done, tokens: run.on_progress(f"{done} of {len(prompts)} completions, {tokens} tokens"),
    )
    theirs, theirs_error = evals.token_mean(*answers)
    ours, ours_error = evals.token_mean(np.where(samples.mask, samples.logps, 0).sum(axis=1), samples.mask.sum(axis=1))
    errors = {"eval_logps/data_per_token_se": theirs_error, "eval_logps/own_per_token_se": ours_error}
    means = {"eval_logps/data_per_token": theirs, "eval_logps/own_per_token": ours, "eval_shift": ours - theirs}
    return means | errors | {"eval_shift_se": math.hypot(theirs_error, ours_error)}


def with_intervals(found: Mapping[str, float]) -> dict[str, float]:
    """The metrics; beside a mean's standard error its 95% interval, beside a share's interval its standard error."""
    more: dict[str, float] = {}
    for name, value in found.items():
        if (error := found.get(f"{name}_se")) is not None and f"{name}_low" not in found:
            more |= {f"{name}_low": value - Z * error, f"{name}_high": value + Z * error}
        elif name.endswith(("accuracies", "accuracy")) and f"{name}_low" in found:
            more[f"{name}_se"] = math.sqrt(value * (1 - value) / found["eval_examples"])
    return {**found, **more}


def auc(larger: np.ndarray, smaller: np.ndarray) -> tuple[float, float]:
    """How often one of `larger` exceeds one of `smaller`, ties counted half: (value, standard error).

    The error is DeLong's (1988, Biometrics 44): the variances of each side's share of wins. NaN where it is not known.
    """
    if not len(larger) or not len(smaller):
        return math.nan, math.nan
    ordered = np.sort(np.asarray(smaller, np.float64)), np.sort(np.asarray(larger, np.float64))
    wins = _below(ordered[0], larger)
    losses = 1 - _below(ordered[1], smaller)
    if min(len(larger), len(smaller)) == 1:
        return float(wins.mean()), math.nan
    variance = wins.var(ddof=1) / len(larger) + losses.var(ddof=1) / len(smaller)
    return float(wins.mean()), float(np.sqrt(variance))


def _below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The share of sorted numbers that is below each value, ties counted half."""
    left, right = (np.searchsorted(ordered, np.asarray(values, np.float64), side) for side in ("left", "right"))
    return (left + right) / (2 * len(ordered))


def correlation(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Pearson's correlation with standard error and 95% interval (Fisher's transformation); NaN where not known."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    spread = x.std() * y.std() if len(x) > 3 else 0.0
    if spread == 0:
        return dict.fromkeys((name, f"{name}_se", f"{name}_low", f"{name}_high"), math.nan)
    r = min(max(float(((x - x.mean()) * (y - y.mean())).mean() / spread), -1.0), 1.0)
    z, error = np.arctanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), 1 / math.sqrt(len(x) - 3)
    return {
        name: r,
        f"{name}_se": (1 - r * r) * error,
        f"{name}_low": math.tanh(z - Z * error),
        f"{name}_high": math.tanh(z + Z * error),
    }


def is_run(model: str) -> bool:
    """Whether `model` is the folder of a run with checkpoints."""
    folder = paths.at(model)
    return (folder / run_folder.CHECKPOINTS).exists() and (folder / run_folder.CONFIG_FILE).exists()


def _of_model(config: ConfigDict, model: str, reference: str | None) -> ConfigDict:
    """The config of a run that would begin with `model`, only to be evaluated."""
    config = config.copy_and_resolve_references()
    if reference is not None and not config_lib.needs_reference(config):
        raise ValueError(f"--reference={reference}: rewards of the loss {config.loss.name!r} need no reference")
    config.reference.mode, config.reference.sync_every = "live", 0
    if is_run(model):
        saved = export.read_config(paths.at(model) / run_folder.CONFIG_FILE)
        config.model, config.lora, config.tokenizer = saved.model, saved.lora, saved.tokenizer
        config.reference.path = reference or saved.reference.path
        return config
    config.lora.rank, config.lora.path, config.model.quantize = 0, None, None
    if not config_lib.needs_reference(config):
        config.model.path, config.model.random = model, None
        return config
    reference = reference or config.reference.path or config.model.path
    if reference is None:
        raise ValueError(
            "the config's model is random weights, which are no reference for another model: give --reference, or the "
            "folder of a run as --model"
        )
    if config.tokenizer.path is None and reference != model:
        ours, theirs = (hf.load_tokenizer(path).get_vocab() for path in (model, reference))
        if ours != theirs:
            raise ValueError(
                f"{model} and the reference {reference} have other tokenizers, so that their log-probs can't be "
                "compared: give a --reference of the same family"
            )
    config.model.path, config.model.random, config.reference.path = model, None, reference
    return config


def _load_rows(config: ConfigDict) -> build.Data:
    """The evaluation rows alone, as training prepares and limits them."""
    config = config.copy_and_resolve_references()
    config.data.weight = None  # of training
    named = config.data.eval
    if apart := bool(named.path or named.split):
        config.data.path, config.data.split = named.path or config.data.path, named.split or config.data.split
        config.data.max_rows, named.path, named.split = None, None, None
    elif not named.fraction:
        raise ValueError("the config names no evaluation rows (data.eval.*): give --data=FILE")
    data = build.load_data(config, None)
    rows = data.train if apart else data.held_out
    assert rows is not None
    if config.eval.max_rows is not None:
        rows = rows.select(np.arange(min(config.eval.max_rows, len(rows))))
    return build.Data(data.tokenizer, data.tokenizer_path, rows, rows)


def _load(model: str, run: build.Run, step: str | int) -> models.Params:
    """The weights of `model` (under LoRA the adapters of a run) in float32, where the run has its own."""
    if is_run(model):
        return checkpoint.restore_params(paths.at(model) / run_folder.CHECKPOINTS, run.state.params, step)[1]
    shardings = jax.tree.map(lambda x: x.sharding, run.state.params)
    return hf.load(model, run.cfg, dtype="float32", shardings=shardings, head=run.objective.head)[1]


def show(found: Mapping[str, float]) -> str:
    """Metrics as lines, each with its standard error and 95% interval."""
    loss = f", loss {found['eval_loss']:.4f}" if "eval_loss" in found else ""
    lines = [f"{found['eval_examples']:.0f} examples{loss}; standard errors, 95% intervals:"]
    for name, value in found.items():
        if f"{name}_low" in found:
            error = f" +- {found[f'{name}_se']:.4f}" if f"{name}_se" in found else ""
            bounds = f"[{found[f'{name}_low']:.4f}, {found[f'{name}_high']:.4f}]"
            lines.append(f"  {name.removeprefix('eval_'):28} {value:.4f}{error} {bounds}")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues) -> None:
    """The command's flags beside those of `config.define_flags`."""
    text = flags.DEFINE_string
    text("model", None, "Hugging Face folder, .gguf file, hub id, package:NAME, or a run's folder.", flag_values=values)
    text("step", "last", "Of a run: last, best or a step's number.", flag_values=values)
    text("reference", None, "Model that rewards are measured against, like --model.", flag_values=values)
    flags.DEFINE_integer(
        "own", 0, "Completions by the model itself that the data's answers are compared with.", flag_values=values
    )
    text("data", None, "Rows in place of the config's evaluation rows, like data.path.", flag_values=values)
    text("out", None, "File for the JSON object.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)


def _of_task(argv: list[str], values: flags.FlagValues) -> bool:
    """Whether the command line asks for a task. ValueError where some of its flags are not for what it asks for."""
    define_flags(values)
    config_lib.define_flags(values)
    of_config = {*values} - {"model", "step", "json", "out", "help"}
    evaluate_task.define_flags(values)
    left = values(argv, known_only=True)[1:]
    of_task = {*values} - of_config - {"model", "step", "json", "out", "help"}
    if values.help or not values.task:
        if given := [name for name in of_task if values[name].present and not values.help]:
            raise ValueError(f"--{min(given)} goes with --task")
        return False
    left += [f"--{name}" for name in of_config if values[name].present]
    if left:
        raise ValueError(f"{left[0]} has no place beside --task, which takes {', '.join(sorted(of_task - {'task'}))}")
    return True


def _config(program: str, rest: list[str], values: flags.FlagValues) -> ConfigDict:
    """The config that the command line names, with its changes."""
    defaults = []
    if values.model and values.config is None and is_run(values.model):
        defaults.append(f"--config={values.model}/{run_folder.CONFIG_FILE}")
    if values.data:
        named = {"data.path": values.data, "data.eval.path": values.data, "data.eval.fraction": 0}
        empty = dict.fromkeys(("data.split", "data.eval.split", "data.name"), "none")
        defaults += [f"--config.{key}={value}" for key, value in (named | empty).items()]
    return config_lib.parse([program, *defaults, *rest], values)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits with 1 or 2 and a message where something does not go together."""
    values = flags.FlagValues()
    program, *rest = sys.argv if argv is None else argv
    try:
        of_task = _of_task([program, *rest], values)
    except (flags.Error, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    config = None if of_task else _config(program, rest, values)
    train.quiet()
    try:
        if values.model is None:
            raise ValueError("--model is missing: a folder, .gguf file, hub id, package:NAME, or the folder of a run")
        hosts.connect()
        main_process = jax.process_index() == 0
        if not main_process:
            logging.getLogger().setLevel(logging.WARNING)
        say = logging.getLogger(__name__).info
        if config is None:
            train.use_compilation_cache("auto")
            found, shown = evaluate_task.run(values, say), evaluate_task.show
        else:
            options = {"step": values.step, "reference": values.reference, "own": values.own}
            found = evaluate(values.model, config, say=say, **options)
            shown = show
        if main_process:
            record = json.dumps({"model": values.model, "step": values.step, **found})
            if values.out:
                paths.replace(values.out, f"{record}\n".encode())
            print(record if values.json else shown(found))
    except Exception as error:
        known = isinstance(error, ValueError)
        text = f"evaluate: {error}" if known else "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            hosts.fail(text)  # an orderly end would wait for the others, which wait for this one
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
