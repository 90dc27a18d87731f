"""Evaluation of preference pairs: per-pair values over fixed batches, and their summary with errors."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import metrics, paths, reference


def evaluate(run: Any, state: Any, *, untrained: bool = False) -> dict[str, float]:
    """The metrics of the policy in `state` over the evaluation pairs of a `build.Run`; `untrained`: before any step."""
    examples = collect(run.examples, state.params, run.eval_batches(state, untrained=untrained))
    return summarize(examples, run.objective.total(examples))


def collect(
    examples: Callable[[Any, Any, Mapping[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, jax.Array]],
) -> dict[str, np.ndarray]:
    """Per-example values of all batches, fillers left out: {name: [N]}.

    Args:
      examples: a jitted objective's `examples`, with replicated outputs.
      params: the weights to evaluate.
      batches: device batches, in order.
    """
    found = [jax.device_get(examples(params, None, batch)) for batch in batches]
    together = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    valid = together["valid"]
    return {name: x[valid] for name, x in together.items()}


_VALUES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def summarize(examples: Mapping[str, np.ndarray], loss: float) -> dict[str, float]:
    """Evaluation metrics under TRL's names, with what tells chance from progress.

    `eval_rewards/margins_se` is the margin's standard error over pairs; `eval_rewards/accuracies_low` and `_high` bound
    the accuracy with 95% (Wilson). `eval_logps/accuracies` is how often the chosen response is the likelier one,
    without a reference; it has bounds too.
    """
    margins = examples["rewards/chosen"] - examples["rewards/rejected"]
    mean, error = metrics.mean_se(margins)
    result = {"eval_loss": loss, "eval_rewards/margins": mean, "eval_rewards/margins_se": error}
    for name in _VALUES:
        result[f"eval_{name}"] = float(examples[name].mean(dtype=np.float64))
    for name, right in (
        ("eval_rewards/accuracies", margins > 0),
        ("eval_logps/accuracies", examples["logps/chosen"] > examples["logps/rejected"]),
    ):
        low, high = metrics.wilson(int(right.sum()), len(right))
        result |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
    result |= {f"eval_{name}": float(x.mean(dtype=np.float64)) for name, x in examples.items() if "log_odds" in name}
    result["eval_pairs"] = len(margins)
    return result


def names() -> list[str]:
    """The names of the metrics that `summarize` gives."""
    return list(summarize(dict.fromkeys(_VALUES, np.zeros(1)), 0.0))


def fixed_prompts(run: Any) -> list[Any]:
    """The prompts that completions are made of: texts from the config, or ids from the first evaluation rows."""
    wanted = run.config.samples.prompts
    if not isinstance(wanted, int):
        return list(wanted)
    data = run.data.train if run.data.held_out is None else run.data.held_out
    return [data.prompt(i) for i in range(min(wanted, len(data)))]


def first_completions(run: Any, params: Any) -> list[dict[str, Any]]:
    """As `completions`, of the untrained policy: made once, then kept beside the reference's log-probs."""
    file = run.first_completions_file()
    if reference.is_everywhere(file):
        return paths.read_json(file)["completions"]
    rows = completions(run, params)
    reference.keep(file, json.dumps({"completions": rows}).encode())
    return rows


def completions(run: Any, params: Any) -> list[dict[str, Any]]:
    """{prompt, completion} of each fixed prompt, as text."""
    from jaxalign import generate

    samples, tokenizer, prompts = run.config.samples, run.data.tokenizer, fixed_prompts(run)
    texts = generate.complete(
        run.cfg,
        params,
        tokenizer,
        prompts,
        max_new_tokens=samples.max_new_tokens,
        temperature=samples.temperature,
        seed=run.config.seed,
        batch_size=len(prompts),
    )
    shown = [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=True) for p in prompts]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]


def line(step: int, found: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    kind = "rewards" if step else "logps"  # before the first step the policy is mostly its own reference
    return (
        f"step {step}: eval_loss {found['eval_loss']:.4f}, margin {found['eval_rewards/margins']:+.4f} "
        f"(standard error {found['eval_rewards/margins_se']:.4f}), {_accuracy(found, kind)} over "
        f"{found['eval_pairs']:.0f} pairs"
    )


def _accuracy(found: Mapping[str, float], kind: str) -> str:
    name = f"eval_{kind}/accuracies"
    what = {"rewards": "accuracy", "logps": "log-prob accuracy"}[kind]
    return f"{what} {found[name]:.3f} [{found[name + '_low']:.3f}, {found[name + '_high']:.3f}]"


def summary(before: Mapping[str, float], after: Mapping[str, float], samples: Sequence[tuple[str, str, str]]) -> str:
    """What a run changed: (prompt, before, after) completions, and the evaluation before and after with its errors."""
    lines = []
    for prompt, old, new in samples:
        lines += [f"> {_shortened(prompt, from_end=True)}", f"  before  {_shortened(old)}"]
        lines += [f"  after   {_shortened(new)}"]
    if after:
        mean, error = after["eval_rewards/margins"], after["eval_rewards/margins_se"]
        above = f" (standard error; {mean / error:.1f} of them above 0)" if error > 0 else ""
        was = f"{before['eval_rewards/margins']:+.4f} before, " if before else ""
        lines += [
            f"held out, {after['eval_pairs']:.0f} pairs:",
            f"  margin {was}{mean:+.4f} +- {error:.4f} after{above}",
            f"  {_accuracy(after, 'rewards')} after (95% interval): how often the chosen answer has the larger reward",
        ]
        if before:
            lines.append(f"  {_accuracy(before, 'logps')} before: how often it was the likelier one, no reference")
    return "\n".join(lines)


def _shortened(text: str, *, from_end: bool = False, width: int = 108) -> str:
    """A text in one line, its middle whitespace single, its beginning or its end left out."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text or "(blank)"
    return "... " + text[-width:] if from_end else text[:width] + " ..."
