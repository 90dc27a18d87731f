"""Any model on preference pairs: `python -m jaxalign.evaluate --model=my-model --config=configs/dpo_smollm2.py`.

    --model=PATH      Hugging Face folder, .gguf file, hub id, package:NAME, or the folder of a run (with --step)
    --config=...      whose evaluation pairs, template, lengths, loss and mesh are taken; of a run by default its own
    --data=FILE       other pairs than the config's
    --reference=PATH  the model that rewards are measured against; by default the config's: what its policy begins as
    --json, --out     one JSON object on stdout; the same to a file

The numbers are those that training logs for the same weights, with more intervals and the responses' perplexities. A
reference that moved while a run trained is not used: rewards are measured against the one that it began with. With
several processes start it on all hosts alike.
"""

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

from jaxalign import build, checkpoint, evals, hf, hosts, models, paths, run_folder, sharding, train
from jaxalign import config as config_lib

Z = 1.959964  # of a 95% interval


def evaluate(
    model: str,
    config: ConfigDict | Mapping[str, Any],
    *,
    step: str | int = "last",
    reference: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """The metrics of `model` over the evaluation pairs of `config`, under the names that training logs.

    Args:
      model: see `hf.resolve`; or the folder of a run.
      config: as `config.load` gives it, with evaluation pairs.
      step: of a run: "last", "best" or a number.
      reference: see `hf.resolve`; None: the config's reference, else its model (of a run: what the run began as).
      say: hears of progress.

    Returns:
      `evals.summarize`'s metrics; besides eval_rewards/accuracies_se and eval_logps/accuracies_se, the margin's
      interval eval_rewards/margins_low and _high, and eval_perplexity/chosen and /rejected with _low and _high.

    Raises:
      ValueError: model, reference, pairs, lengths and mesh do not go together, or something is not there.
    """
    config = _of_model(config_lib.validate(config, n_devices=jax.device_count()), model, reference)
    train.use_compilation_cache(config.compilation_cache)
    data = _load_pairs(config)
    config.eval.max_rows = None  # they are cut to it
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with sharding.use_mesh(mesh):
        run = build.Run(config, mesh, data)
        run.score_reference(say)
        run.cached_reference = True  # no step will ask the reference: it makes room for the model
        run.release()
        params = _load(model, run, step)
        examples = evals.collect(run.examples, params, run.eval_batches(run.state._replace(params=params)))
    found = evals.summarize(examples, run.objective.total(examples))
    for name in ("eval_rewards/accuracies", "eval_logps/accuracies"):
        found[f"{name}_se"] = math.sqrt(found[name] * (1 - found[name]) / found["eval_pairs"])
    margin, error = found["eval_rewards/margins"], found["eval_rewards/margins_se"]
    found |= {"eval_rewards/margins_low": margin - Z * error, "eval_rewards/margins_high": margin + Z * error}
    for side in ("chosen", "rejected"):
        value, low, high = perplexity(-examples[f"nll/{side}"], examples[f"{side}_tokens"])
        name = f"eval_perplexity/{side}"
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


def perplexity(logps: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """exp(NLL per token) over responses and its 95% interval: (value, low, high).

    The interval is that of a ratio of two means over responses (the tokens of one are not independent): Cochran 1977,
    Sampling Techniques, 6.4. One response has the interval NaN.

    Args:
      logps: [N] the responses' log-probs. tokens: [N] their tokens.
    """
    nll, n = -np.asarray(logps, np.float64), len(logps)
    rate = nll.sum() / tokens.sum()
    error = math.nan
    if n > 1:
        error = math.sqrt(np.square(nll - rate * tokens).sum() * n / (n - 1)) / tokens.sum()
    return float(np.exp(rate)), float(np.exp(rate - Z * error)), float(np.exp(rate + Z * error))


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
        saved = json.loads((paths.at(model) / run_folder.CONFIG_FILE).read_text())
        config.model.path, config.model.random = saved["model"]["path"], saved["model"]["random"]
        config.tokenizer.path = saved["tokenizer"]["path"]
        config.reference.path = reference or saved["reference"]["path"]
        return config
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


def _load_pairs(config: ConfigDict) -> build.Data:
    """The evaluation pairs alone, as training prepares and limits them."""
    config = config.copy_and_resolve_references()
    named = config.data.eval
    if apart := bool(named.path or named.split):
        config.data.path, config.data.split = named.path or config.data.path, named.split or config.data.split
        config.data.max_rows, named.path, named.split = None, None, None
    elif not named.fraction:
        raise ValueError("the config names no evaluation pairs (data.eval.*): give --data=FILE")
    data = build.load_data(config, None)
    pairs = data.train if apart else data.held_out
    assert pairs is not None
    if config.eval.max_rows is not None:
        pairs = pairs.select(np.arange(min(config.eval.max_rows, len(pairs))))
    return build.Data(data.tokenizer, data.tokenizer_path, pairs, pairs)


def _load(model: str, run: build.Run, step: str | int) -> models.Params:
    """The weights of `model` in float32, where the run has its own."""
    if is_run(model):
        return checkpoint.restore_params(paths.at(model) / run_folder.CHECKPOINTS, run.state.params, step)[1]
    shardings = jax.tree.map(lambda x: x.sharding, run.state.params)
    return hf.load(model, run.cfg, dtype="float32", shardings=shardings)[1]


def show(found: Mapping[str, float]) -> str:
    """Metrics as lines, each with its standard error and 95% interval."""

    def line(what: str, name: str, sign: str = "") -> str:
        error = f" +- {found[f'{name}_se']:.4f}" if f"{name}_se" in found else ""
        value, low, high = (f"{found[key]:{sign}.4f}" for key in (name, f"{name}_low", f"{name}_high"))
        return f"  {what:22} {value}{error} [{low}, {high}]"

    return "\n".join(
        (
            f"{found['eval_pairs']:.0f} pairs, loss {found['eval_loss']:.4f}; standard errors and 95% intervals:",
            line("reward accuracy", "eval_rewards/accuracies"),
            line("reward margin", "eval_rewards/margins", "+"),
            line("log-prob accuracy", "eval_logps/accuracies"),
            line("perplexity of chosen", "eval_perplexity/chosen"),
            line("perplexity of rejected", "eval_perplexity/rejected"),
        )
    )


def define_flags(values: flags.FlagValues) -> None:
    """The command's flags beside those of `config.define_flags`."""
    text = flags.DEFINE_string
    text("model", None, "Hugging Face folder, .gguf file, hub id, package:NAME, or a run's folder.", flag_values=values)
    text("step", "last", "Of a run: last, best or a step's number.", flag_values=values)
    text("reference", None, "Model that rewards are measured against, like --model.", flag_values=values)
    text("data", None, "Pairs in place of the config's evaluation pairs, like data.path.", flag_values=values)
    text("out", None, "File for the JSON object.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits with 1 or 2 and a message where something does not go together."""
    values = flags.FlagValues()
    define_flags(values)
    config_lib.define_flags(values)
    program, *rest = sys.argv if argv is None else argv
    try:
        values([program, *rest], known_only=True)
    except flags.Error as error:
        raise SystemExit(f"evaluate: {error}") from error
    defaults = []
    if values.model and values.config is None and is_run(values.model):
        defaults.append(f"--config={values.model}/{run_folder.CONFIG_FILE}")
    if values.data:
        named = {"data.path": values.data, "data.eval.path": values.data, "data.eval.fraction": 0}
        empty = dict.fromkeys(("data.split", "data.eval.split", "data.name"), "none")
        defaults += [f"--config.{key}={value}" for key, value in (named | empty).items()]
    config = config_lib.parse([program, *defaults, *rest], values)
    train.quiet()
    try:
        if values.model is None:
            raise ValueError("--model is missing: a folder, .gguf file, hub id, package:NAME, or the folder of a run")
        hosts.connect()
        main_process = jax.process_index() == 0
        if not main_process:
            logging.getLogger().setLevel(logging.WARNING)
        say = logging.getLogger(__name__).info
        found = evaluate(values.model, config, step=values.step, reference=values.reference, say=say)
        if main_process:
            record = json.dumps({"model": values.model, "step": values.step, **found})
            if values.out:
                paths.replace(values.out, f"{record}\n".encode())
            print(record if values.json else show(found))
    except Exception as error:
        known = isinstance(error, ValueError)
        text = f"evaluate: {error}" if known else "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            hosts.fail(text)  # an orderly end would wait for the others, which wait for this one
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
