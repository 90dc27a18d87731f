"""Evaluation: values of each example over fixed batches, and their summary with errors."""

import collections
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import hf, metrics, paths, reference, tasks
from jaxalign.metrics import Z

SHOWN = 4  # completions of a group on the terminal


def evaluate(run: Any, state: Any, *, untrained: bool = False) -> dict[str, float]:
    """The metrics of the policy in `state` over the evaluation rows of a `build.Run`; `untrained`: before any step."""
    if run.rollouts is not None:
        return of_completions(run, run.whole(state.params))
    batches = run.eval_batches(state, untrained=untrained)
    return summarize(run.objective, collect(run.examples, state.params, batches, run.base))


def of_completions(run: Any, params: Any) -> dict[str, float]:
    """Rewards and lengths of completions of the evaluation prompts, the same random numbers every time."""
    rollouts, given = run.rollouts, run.config.eval
    found = tasks.answer(
        rollouts.actor,
        params,
        run.eval_data,
        n=given.num_generations,
        temperature=run.config.rollout.temperature if given.temperature is None else given.temperature,
        seed=run.config.seed,
        tell=lambda answers: run.on_progress(f"the answers to prompt {answers.places[-1]} of an evaluation"),
    )
    rewards_CF = found.rewards.reshape(-1, found.rewards.shape[-1])
    reward_PN = rollouts.sums(rewards_CF).reshape(found.tokens.shape)
    return completion_metrics(run.reward_names, found.rewards, reward_PN, found.tokens)


def collect(
    examples: Callable[[Any, Any, Mapping[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, jax.Array]],
    frozen: Any = None,
) -> dict[str, np.ndarray]:
    """Per-example values of all batches, fillers left out: {name: [N]}.

    Args:
      examples: a jitted objective's `examples`, with replicated outputs.
      params: the weights to evaluate, or adapters of `frozen` ones.
      batches: device batches, in order.
    """
    found = [jax.device_get(examples(params, frozen, batch)) for batch in batches]
    together = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    valid = together["valid"]
    return {name: x[valid] for name, x in together.items()}


def summarize(objective: Any, examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Evaluation metrics of an objective's `examples`, with what tells chance from progress.

    `eval_loss`, `eval_examples`, and under TRL's names what `SUMMARIES` has for this form of examples. `..._se` is a
    standard error over examples; `..._low` and `..._high` bound a share with 95% (Wilson), a perplexity by the loss's.
    """
    found = {"eval_loss": objective.total(examples)} | SUMMARIES[form(objective)](examples)
    return found | {"eval_examples": len(examples["valid"])}


def form(objective: Any) -> str:
    """Which of SUMMARIES describes an objective's examples."""
    return form_of(objective.kind, objective.head)


def form_of(kind: str, head: str) -> str:
    """The same, of the kind and the head of an objective."""
    return "reward" if (kind, head) == ("pairs", "score") else kind


def headline(names: Iterable[str]) -> str:
    """The metric, of those found, that says most in one number; it has a standard error."""
    known = ("eval_reward", "eval_margin", "eval_rewards/margins", "eval_loss")
    return next(name for name in known if f"{name}_se" in names)


def _pairs(examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`eval_logps/accuracies` is how often the chosen response is the likelier one, without a reference."""
    margins = examples["rewards/chosen"] - examples["rewards/rejected"]
    found = _mean("eval_rewards/margins", margins)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        found[f"eval_{name}"] = float(examples[name].mean(dtype=np.float64))
    found |= _share("eval_rewards/accuracies", margins > 0)
    found |= _share("eval_logps/accuracies", examples["logps/chosen"] > examples["logps/rejected"])
    odds = [name for name in examples if name.startswith("log_odds")]
    return found | {f"eval_{name}": float(examples[name].mean(dtype=np.float64)) for name in odds}


def _labelled(examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Desirable responses are the chosen ones; the margin is the difference of the two means."""
    desirable = examples["label"] > 0.5

    def of(name: str, side: np.ndarray) -> tuple[float, float]:
        values = examples[name][side]
        return metrics.mean_se(values) if len(values) else (math.nan, math.nan)

    (chosen, chosen_error), (rejected, rejected_error) = of("rewards", desirable), of("rewards", ~desirable)
    return {
        "eval_rewards/margins": chosen - rejected,
        "eval_rewards/margins_se": math.hypot(chosen_error, rejected_error),
        "eval_rewards/chosen": chosen,
        "eval_rewards/rejected": rejected,
        "eval_logps/chosen": of("logps", desirable)[0],
        "eval_logps/rejected": of("logps", ~desirable)[0],
    }


def _chats(examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The NLL of a token, in nats, and its exponential."""
    nll, error = token_mean(examples["nll"], examples["tokens"])
    correct, tokens = examples["correct"].sum(dtype=np.float64), examples["tokens"].sum(dtype=np.float64)
    return {
        "eval_nll": nll,
        "eval_loss_se": token_mean(examples["loss"], examples["tokens"])[1],
        **perplexity("eval_perplexity", nll, error),
        "eval_mean_token_accuracy": float(correct / tokens),
        "eval_tokens": float(tokens),
    }


def _reward(examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A reward model's scores of pairs."""
    chosen, rejected = examples["rewards/chosen"], examples["rewards/rejected"]
    both = np.concatenate([chosen, rejected])
    found = {f"eval_{name}_reward": float(getattr(both, name)()) for name in ("min", "mean", "max")}
    return found | _mean("eval_margin", chosen - rejected) | _share("eval_accuracy", chosen > rejected)


def _scored(examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Attribute scores: the squared error of one, and the composed rewards."""
    _, error = token_mean(examples["loss"], examples["scores"])
    return {"eval_loss_se": error, **_mean("eval_rewards", examples["rewards"])}


SUMMARIES: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, float]]] = {
    "pairs": _pairs,
    "triples": _pairs,
    "labelled": _labelled,
    "singles": _labelled,
    "chats": _chats,
    "reward": _reward,
    "scored": _scored,
}


def names(objective: Any, rewards: Sequence[str] = ()) -> list[str]:
    """The names of the metrics that `evaluate` gives, but for a mean of what only some losses log.

    `rewards`: the names of what rewards completions, where the policy samples.
    """
    if rewards:
        return list(completion_metrics(rewards, np.zeros((2, 1, len(rewards))), np.zeros((2, 1)), np.zeros((2, 1))))
    numbers: Mapping[str, np.ndarray] = collections.defaultdict(lambda: np.arange(1.0, 3.0))
    return ["eval_loss", *SUMMARIES[form(objective)](numbers), "eval_examples"]


def completion_metrics(
    names: Sequence[str], rewards_PNF: np.ndarray, reward_PN: np.ndarray, tokens_PN: np.ndarray
) -> dict[str, float]:
    """Of N completions of each of P prompts: rewards, what they come to, and lengths; errors are over prompts.

    A prompt without a reward (all NaN) takes no part in that reward's mean.
    """
    found = _mean("eval_reward", _over_completions(reward_PN))
    for name, values_PN in zip(names, np.moveaxis(rewards_PNF, -1, 0), strict=True):
        mean, error = metrics.mean_se(_over_completions(values_PN))
        found |= {f"eval_rewards/{name}/mean": mean, f"eval_rewards/{name}/mean_se": error}
    return found | _mean("eval_completions/mean_length", tokens_PN.mean(axis=1)) | {"eval_examples": len(tokens_PN)}


def _over_completions(x_PN: np.ndarray) -> np.ndarray:
    """The mean of each prompt that has one; [NaN] where none has."""
    known = ~np.isnan(x_PN)
    there = known.any(axis=1)
    return np.nansum(x_PN, axis=1)[there] / known.sum(axis=1)[there] if there.any() else np.array([np.nan])


def token_mean(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """(sum of sums / sum of tokens, its standard error): of a mean over tokens, those of one example not independent.

    The error is that of a ratio of two means over examples (Cochran 1977, Sampling Techniques, 6.4); of one it is NaN.
    """
    values, n = np.asarray(sums, np.float64), len(sums)
    total = np.asarray(tokens, np.float64).sum()
    rate = values.sum() / total
    if n == 1:
        return float(rate), math.nan
    return float(rate), math.sqrt(np.square(values - rate * tokens).sum() * n / (n - 1)) / float(total)


def perplexity(name: str, nll: float, error: float) -> dict[str, float]:
    """exp(nll of a token) with its 95% interval."""
    return {name: math.exp(nll), f"{name}_low": math.exp(nll - Z * error), f"{name}_high": math.exp(nll + Z * error)}


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    mean, error = metrics.mean_se(values)
    return {name: mean, f"{name}_se": error}


def _share(name: str, right: np.ndarray) -> dict[str, float]:
    low, high = metrics.wilson(int(right.sum()), len(right))
    return {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}


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
        run.whole(params),
        tokenizer,
        prompts,
        max_new_tokens=samples.max_new_tokens,
        temperature=samples.temperature,
        seed=run.config.seed,
        batch_size=len(prompts),
        stop_ids=hf.stop_ids(run.cfg, tokenizer, run.config.model.path),
    )
    shown = [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=True) for p in prompts]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]


def line(step: int, found: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    name = headline(found)
    if name == "eval_reward":
        length = f"{found['eval_completions/mean_length']:.0f} tokens a completion"
        value = f"eval_reward {found[name]:.4f}{_error(found, name)}"
        return f"step {step}: {value}, {length} over {found['eval_examples']:.0f} prompts"
    parts = [f"eval_loss {found['eval_loss']:.4f}" + (_error(found, name) if name == "eval_loss" else "")]
    if name != "eval_loss":
        parts.append(f"margin {found[name]:+.4f}{_error(found, name)}")
    # Before the first step the policy is mostly its own reference.
    kind = "accuracy" if "eval_accuracy" in found else "rewards/accuracies" if step else "logps/accuracies"
    if f"eval_{kind}" in found:
        parts.append(_accuracy(found, kind))
    if "eval_perplexity" in found:
        parts.append(f"perplexity {found['eval_perplexity']:.3f}")
    return f"step {step}: {', '.join(parts)} over {found['eval_examples']:.0f} examples"


def group(step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """A prompt's first completions with their rewards and advantages: rows of completions.jsonl, a line each."""
    lines = [f"step {step}: > {_shortened(rows[0]['prompt'], from_end=True)}"]
    for row in rows[:SHOWN]:
        rewards = ", ".join(f"{name} {_rounded(x)}" for name, x in row.items() if name not in ("prompt", "completion"))
        lines.append(f"  {rewards}: {_shortened(row['completion'])}")
    return "\n".join(lines)


def _rounded(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def _error(found: Mapping[str, float], name: str) -> str:
    return f" (standard error {found[f'{name}_se']:.4f})"


def _accuracy(found: Mapping[str, float], kind: str) -> str:
    name = f"eval_{kind}"
    what = "log-prob accuracy" if kind.startswith("logps") else "accuracy"
    return f"{what} {found[name]:.3f} [{found[name + '_low']:.3f}, {found[name + '_high']:.3f}]"


def summary(before: Mapping[str, float], after: Mapping[str, float], samples: Sequence[tuple[str, str, str]]) -> str:
    """What a run changed: (prompt, before, after) completions, and the evaluation before and after with its errors."""
    lines = []
    for prompt, old, new in samples:
        lines += [f"> {_shortened(prompt, from_end=True)}", f"  before  {_shortened(old)}"]
        lines += [f"  after   {_shortened(new)}"]
    if not after:
        return "\n".join(lines)
    name = headline(after)
    what = {"eval_loss": "loss", "eval_reward": "reward"}.get(name, "margin")
    mean, error = after[name], after[f"{name}_se"]
    sign = "+" if what == "margin" else ""
    above = f" (standard error; {mean / error:.1f} of them above 0)" if sign and error > 0 else ""
    was = f"{before[name]:{sign}.4f} before, " if before else ""
    lines += [
        f"held out, {after['eval_examples']:.0f} examples:",
        f"  {what} {was}{mean:{sign}.4f} +- {error:.4f} after{above}",
    ]
    if "eval_perplexity" in after:
        was = f"{before['eval_perplexity']:.3f} before, " if before else ""
        bounds = f"[{after['eval_perplexity_low']:.3f}, {after['eval_perplexity_high']:.3f}]"
        lines.append(f"  perplexity {was}{after['eval_perplexity']:.3f} {bounds} after")
    if (kind := next((kind for kind in ("accuracy", "rewards/accuracies") if f"eval_{kind}" in after), None)) is None:
        return "\n".join(lines)
    lines.append(f"  {_accuracy(after, kind)} after (95% interval): how often the chosen answer has the larger reward")
    if before and kind == "accuracy":
        lines.append(f"  {_accuracy(before, kind)} before")
    elif before:
        likelier = _accuracy(before, "logps/accuracies")
        lines.append(f"  {likelier} before: how often it was the likelier one, no reference")
    return "\n".join(lines)


def _shortened(text: str, *, from_end: bool = False, width: int = 108) -> str:
    """A text in one line, its middle whitespace single, its beginning or its end left out."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text or "(blank)"
    return "... " + text[-width:] if from_end else text[:width] + " ..."
