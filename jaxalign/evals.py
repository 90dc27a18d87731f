"""Evaluation of preference pairs: per-pair values over fixed batches, and their summary with errors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import metrics


def collect(
    examples: Callable[[Any, Any, Mapping[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Sequence[Mapping[str, jax.Array]] | Any,
) -> dict[str, np.ndarray]:
    """Per-example values of all batches, fillers left out: {name: [N]}.

    Args:
      examples: a jitted objective's `examples`, with replicated outputs.
      params: the weights to evaluate.
      batches: device batches, in order; may be an iterator.
    """
    found = [jax.device_get(examples(params, None, batch)) for batch in batches]
    together = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    valid = together["valid"]
    return {name: x[valid] for name, x in together.items()}


def summarize(examples: Mapping[str, np.ndarray], loss: float) -> dict[str, float]:
    """Evaluation metrics under TRL's names, with what tells chance from progress.

    `eval_rewards/margins_se` is the margin's standard error over pairs; `eval_rewards/accuracies_low` and `_high` bound the
    accuracy with 95% (Wilson). `eval_logps/accuracies` is how often the chosen response is the likelier one, without a
    reference; it has bounds too.
    """
    margins = examples["rewards/chosen"] - examples["rewards/rejected"]
    mean, error = metrics.mean_se(margins)
    result = {"eval_loss": loss, "eval_rewards/margins": mean, "eval_rewards/margins_se": error}
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        result[f"eval_{name}"] = float(examples[name].mean(dtype=np.float64))
    for name, right in (
        ("eval_rewards/accuracies", margins > 0),
        ("eval_logps/accuracies", examples["logps/chosen"] > examples["logps/rejected"]),
    ):
        low, high = metrics.wilson(int(right.sum()), len(right))
        result |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
    result["eval_pairs"] = len(margins)
    return result


def fixed_prompts(run: Any) -> list[Any]:
    """The prompts that completions are made of: texts from the config, or ids from the first evaluation rows."""
    wanted = run.config.samples.prompts
    if not isinstance(wanted, int):
        return list(wanted)
    data = run.data.train if run.data.held_out is None else run.data.held_out
    return [data.prompt(i) for i in range(min(wanted, len(data)))]


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
    shown = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]


def line(step: int, found: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    return (
        f"step {step}: eval_loss {found['eval_loss']:.4f}, margin {found['eval_rewards/margins']:+.4f} "
        f"(standard error {found['eval_rewards/margins_se']:.4f}), {_accuracy(found, 'rewards')} over "
        f"{found['eval_pairs']:.0f} pairs"
    )


def _accuracy(found: Mapping[str, float], kind: str) -> str:
    name = f"eval_{kind}/accuracies"
    return f"{kind} accuracy {found[name]:.3f} [{found[name + '_low']:.3f}, {found[name + '_high']:.3f}]"


def summary(before: Mapping[str, float], after: Mapping[str, float], samples: Sequence[tuple[str, str, str]]) -> str:
    """What a run changed: evaluation before and after with errors, and (prompt, before, after) completions."""
    lines = []
    for prompt, old, new in samples:
        lines += [f"--- {prompt.strip()[-300:]}", f"  before: {old.strip()}", f"  after:  {new.strip()}"]
    if after:
        mean, error = after["eval_rewards/margins"], after["eval_rewards/margins_se"]
        lines += [
            f"held out, {after['eval_pairs']:.0f} pairs:",
            f"  margin               0 before -> {mean:+.4f} +- {error:.4f} (standard error; {mean / error:.1f} of them above 0)"
            if error > 0
            else f"  margin               {mean:+.4f}",
            f"  {_accuracy(after, 'rewards')} (95% interval)",
        ]
        if before:
            lines.append(f"  {_accuracy(before, 'logps')} before training: the likelier answer, without a reference")
    return "\n".join(lines)
