"""How the keys of a config stand together: what it says of its loss and data, contradictions, keys without effect.

`config.validate` lists all problems at once, and `config` is where the rest of the program asks. Options of losses and
optimizers are known by the modules that define them, which import jax: they are imported where they are asked.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxalign.config_keys import BY_NAME, KEYS, flatten, plain
from jaxalign.messages import did_you_mean
from jaxalign.user_code import is_function

# What a secret looks like: keys of hubs and trackers, or a password inside an address. They come from the environment.
_SECRET = re.compile(r"\b(hf|sk|ghp|gsk|xox[bp])[_-][A-Za-z0-9_-]{16,}|://[^/\s:@]+:[^/\s@]+@|\b[0-9a-f]{40}\b")

Problem = tuple[tuple[str, ...], str]
"""The keys that a problem is about, and its text."""


@dataclasses.dataclass(frozen=True)
class Given:
    """What the check knows besides the config (see `config.validate`)."""

    n_devices: int | None = None
    dataset: bool = False
    eval_dataset: bool = False


def kind(config: ConfigDict) -> str:
    """What an example of the run's data is: see `objectives.WIDTHS`."""
    from jaxalign import objectives

    return objectives.kind_of(config.loss.name.split("+"))


def head(config: ConfigDict) -> str:
    """The head of the run's model: lm, or score where it gives rewards."""
    from jaxalign import objectives

    return objectives.LOSSES[config.loss.name.partition("+")[0]].head


def is_lora(config: ConfigDict) -> bool:
    """Whether adapters are trained beside frozen weights."""
    return bool(config.lora.rank or config.lora.path)


def needs_reference(config: ConfigDict) -> bool:
    """Whether the objective compares with a reference model."""
    from jaxalign import objectives

    return objectives.needs_reference(config.loss.name.split("+"), config.loss.beta)


def loss_arguments(config: ConfigDict) -> tuple[dict[str, float], dict[str, Any]]:
    """What `objectives.make` wants of `loss.*`: {term: weight} in the order of loss.name, and the options set.

    A key at its default is left to the losses, which may have different ones of their own.
    """
    names = config.loss.name.split("+")
    weights = config.loss.weights or (1.0,) * len(names)
    from jaxalign import objectives

    options = frozenset[str]().union(*(objectives.options_of(name) for name in names))
    values = {name: config.loss[name] for name in sorted(options)}
    given = {name: value for name, value in values.items() if value != BY_NAME[f"loss.{name}"].default}
    return dict(zip(names, weights, strict=True)), given


def contradictions(c: ConfigDict, given: Given) -> Iterator[Problem]:
    """Keys that can't stand together, or that are missing beside others."""
    from jaxalign.data.formats import FORMATS
    from jaxalign.optim import OPTIMIZERS

    of_eval = ("data.eval.path", "data.eval.split", "data.eval.fraction")
    split, holdout = c.data.eval.split, c.data.eval.fraction
    buckets, prompt = list(c.data.buckets), c.data.max_prompt_length
    profile, warmup = c.log.profile_steps, c.optim.warmup_steps
    yield from _exactly_one("steps", c.steps, "epochs", c.epochs)
    yield from _exactly_one("model.path", c.model.path, "model.random", c.model.random)
    rules: list[tuple[bool, tuple[str, ...], str]] = [
        (c.workdir is None, ("workdir",), "workdir is missing: the folder that the run writes to"),
        (bool(c.log.tensorboard and str(c.workdir).startswith("gs://")), ("log.tensorboard", "workdir"),
         f"log.tensorboard appends to files, which a bucket can't do (workdir is {c.workdir!r}): set it to false"),
        (c.model.random is not None and c.tokenizer.path is None, ("model.random", "tokenizer.path"),
         "tokenizer.path is missing: model.random has none of its own (bytes?)"),
        (given.dataset and c.data.path is not None, ("data.path",),
         f"data.path is {c.data.path!r}, but a dataset is given as well: set it to None"),
        (not given.dataset and c.data.path is None, ("data.path",),
         "data.path is missing: the file, folder or hub id of the training rows"),
        (given.eval_dataset and _names_eval(c), of_eval,
         f"{', '.join(of_eval)}: an eval_dataset is given as well, so none of them may be set"),
        (bool(holdout and (c.data.eval.path or split)), of_eval,
         "data.eval.fraction holds out training rows, but data.eval.path or data.eval.split names others: set one"),
        (bool(split and not c.data.eval.path and split == (c.data.split or "train")), ("data.eval.split", "data.split"),
         f"data.eval.split is the training split {split!r}"),
        (bool(buckets) and (buckets != sorted(set(buckets)) or buckets[-1] < c.max_length),
         ("data.buckets", "max_length"),
         f"data.buckets is {buckets}, expected ascending lengths, the last at least max_length = {c.max_length}"),
        (prompt is not None and prompt >= c.max_length, ("data.max_prompt_length", "max_length"),
         f"data.max_prompt_length = {prompt} leaves no response below max_length = {c.max_length}"),
        (c.data.format not in ("auto", *FORMATS) and not is_function(c.data.format), ("data.format",),
         f"data.format: got {c.data.format!r}, expected auto, FILE.function or one of {', '.join(FORMATS)}"),
        (bool(c.reference.sync_every) and c.reference.mode == "cached", ("reference.sync_every", "reference.mode"),
         "reference.sync_every moves the reference, but reference.mode=cached scores it once: take live"),
        (bool(warmup) and c.optim.warmup_ratio is not None, ("optim.warmup_steps", "optim.warmup_ratio"),
         "optim.warmup_steps and optim.warmup_ratio: set one"),
        (c.steps is not None and warmup > c.steps, ("optim.warmup_steps", "steps"),
         f"optim.warmup_steps = {warmup} is longer than the run's steps = {c.steps}"),
        (c.optim.name not in OPTIMIZERS, ("optim.name",),
         f"optim.name: got {c.optim.name!r}, expected one of {', '.join(OPTIMIZERS)}"
         f"{did_you_mean(c.optim.name, OPTIMIZERS)}"),
        (bool(profile) and (len(profile) != 2 or profile[0] > profile[1]), ("log.profile_steps",),
         f"log.profile_steps is {profile}, expected (first, last)"),
    ]  # fmt: skip
    yield from ((names, text) for wrong, names, text in rules if wrong)
    yield from _batch_contradictions(c, given.n_devices)
    yield from _loss_contradictions(c)
    yield from _lora_contradictions(c)
    kind, terms = _known_terms(c)
    if kind == "prompts":
        yield from _rollout_contradictions(c)
    if c.samples.prompts and terms and head(c) == "score":
        text = f"samples.prompts is {c.samples.prompts}, but a reward model ({c.loss.name}) says nothing: set it to 0"
        yield ("samples.prompts", "loss.name"), text
    yield from _packing_contradictions(c, kind)
    yield from _best_contradictions(c, given)
    for name, value in flatten(c).items():
        if isinstance(value, str) and _SECRET.search(value):
            text = "holds what looks like a secret, which has no place in a config: use the environment (HF_TOKEN)"
            yield (name,), f"{name} {text}"


def _exactly_one(name: str, value: Any, other_name: str, other: Any) -> Iterator[Problem]:
    if (value is None) == (other is None):
        state = "neither is" if value is None else f"both are ({value!r}, {plain(other)!r})"
        yield (name, other_name), f"{name}, {other_name}: exactly one is to be set, but {state}"


def _batch_contradictions(c: ConfigDict, n_devices: int | None) -> Iterator[Problem]:
    batch = ("batch_size", "gradient_accumulation_steps")
    splits = c.gradient_accumulation_steps
    if c.batch_size % splits:
        yield batch, f"batch_size = {c.batch_size} is no multiple of gradient_accumulation_steps = {splits}"
    sizes = {axis: c.mesh[axis] for axis in ("data", "fsdp", "tensor", "sequence")}
    names = tuple(f"mesh.{axis}" for axis in sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size == 0:
            yield (f"mesh.{axis}",), f"mesh.{axis} is 0, expected a number of devices, or -1 for all that is left"
    if len(free) > 1:
        one, other = f"mesh.{free[0]}", f"mesh.{free[1]}"
        yield names, f"{one} and {other} are both -1 (all that is left): set one of them, e.g. {one}=1"
    if 0 in sizes.values() or len(free) > 1 or n_devices is None:
        return
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if n_devices % fixed or (not free and fixed != n_devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        yield names, f"mesh {shape} doesn't use {n_devices} devices exactly; -1 for one axis takes all that is left"
        return
    for axis in free:
        sizes[axis] = n_devices // fixed
    from jaxalign import objectives
    from jaxalign.data.batching import default_buckets

    shards = sizes["data"] * sizes["fsdp"]
    kind = _known_terms(c)[0] if c.data.packing == "off" else None  # packed rows are as many as divide
    width = 0 if kind is None else objectives.WIDTHS[kind]
    rows = width * c.batch_size // splits
    if rows % shards:
        text = (
            f"a micro-batch has {rows} rows ({width} x batch_size {c.batch_size} / gradient_accumulation_steps "
            f"{splits}), no multiple of mesh.data x mesh.fsdp = {shards} devices"
        )
        yield (*batch, *names), text
    if c.eval.batch_size is not None and width * c.eval.batch_size % shards:
        rows = width * c.eval.batch_size
        text = f"eval.batch_size = {c.eval.batch_size} is {rows} rows, no multiple of mesh.data x mesh.fsdp = {shards}"
        yield ("eval.batch_size", *names), text

    for length in c.data.buckets or default_buckets(c.max_length):
        if length % sizes["sequence"]:
            text = f"rows of {length} tokens don't split over mesh.sequence = {sizes['sequence']}: set data.buckets"
            yield ("max_length", "data.buckets", *names), text
            break


def _loss_contradictions(c: ConfigDict) -> Iterator[Problem]:
    from jaxalign import objectives

    terms = c.loss.name.split("+")
    if len(set(terms)) != len(terms):
        yield ("loss.name",), f"loss.name = {c.loss.name!r} names a term twice: give it one weight"
    try:
        objectives.check_names(terms)
    except ValueError as error:
        yield ("loss.name",), f"loss.name: {error}"
        return
    yield from _option_contradictions(c, terms)
    if len(terms) > 1 and c.loss.weights and len(c.loss.weights) != len(terms):
        text = f"loss.weights has {len(c.loss.weights)} numbers for the {len(terms)} terms of {c.loss.name!r}"
        yield ("loss.weights", "loss.name"), text


def _option_contradictions(c: ConfigDict, terms: Sequence[str]) -> Iterator[Problem]:
    """Options that some of the terms take and that can't stand with the others."""
    from jaxalign.losses import LOG_PROB_OPTIONS, LOSSES, POLICY, check_terms, policy_options
    from jaxalign.losses.policy import check

    pairwise = [term for term in terms if term in LOSSES]
    for option in LOG_PROB_OPTIONS:
        if any(option in LOSSES[term].options for term in pairwise):  # else it has no effect at all
            try:
                check_terms(pairwise, {option: c.loss[option]})
            except ValueError as error:
                yield (f"loss.{option}", "loss.name"), f"loss.{error}"
    of_prompts = [term for term in terms if term in POLICY]
    if c.loss.beta == 0 and not of_prompts:
        text = "loss.beta: got 0.0, expected a number in (0, inf); only losses of prompts do without a reference"
        yield ("loss.beta", "loss.name"), text
    for term in of_prompts:
        try:
            check(term, {**policy_options(term), **loss_arguments(c)[1]})
        except ValueError as error:
            yield ("loss.name",), f"loss.{error}"
    if "exo_pair" in terms and c.loss.label_smoothing == 0:
        text = "loss.label_smoothing is 0, but exo_pair divides by it: set a small one, e.g. 0.001"
        yield ("loss.label_smoothing", "loss.name"), text
    columns, weights = c.data.score_columns, c.loss.reward_weights
    if "attributes" in terms and not columns:
        yield ("data.score_columns", "loss.name"), "data.score_columns is missing: the columns that attributes learns"
    elif "attributes" in terms and weights and len(weights) != len(columns):
        text = f"loss.reward_weights has {len(weights)} numbers for the {len(columns)} data.score_columns"
        yield ("loss.reward_weights", "data.score_columns"), text


def _lora_contradictions(c: ConfigDict) -> Iterator[Problem]:
    if not is_lora(c):
        return
    if c.lora.path is not None and c.lora.rank:
        text = f"lora.rank is {c.lora.rank}, but the adapter {c.lora.path!r} has its own: set it to 0"
        yield ("lora.path", "lora.rank"), text
    if c.reference.sync_every:
        text = "reference.sync_every moves the reference's weights, which under LoRA are the frozen ones: set it to 0"
        yield ("reference.sync_every", "lora.rank"), text


def _rollout_contradictions(c: ConfigDict) -> Iterator[Problem]:
    """Of a loss whose examples are completions that the policy samples."""
    r, weights, clip = c.rollout, c.rewards.weights, c.rewards.clip_range
    group, sampled = r.num_generations, c.batch_size * r.steps_per_generation
    longest, prompt = r.max_completion_length, c.data.max_prompt_length or 1
    from jaxalign.losses import POLICY
    from jaxalign.rewards import name_of

    names = [name_of(name) for name in c.rewards.functions]
    rules: list[tuple[bool, tuple[str, ...], str]] = [
        (not names, ("rewards.functions",),
         f"rewards.functions is missing: what tells good completions from bad ones, for the loss {c.loss.name!r}"),
        (len(set(names)) != len(names), ("rewards.functions",),
         f"rewards.functions: two of {', '.join(names)} have one name in the metrics"),
        (bool(weights) and len(weights) != len(names), ("rewards.weights", "rewards.functions"),
         f"rewards.weights has {len(weights)} numbers for the {len(names)} rewards.functions"),
        (bool(clip) and (len(clip) != 2 or clip[0] >= clip[-1]), ("rewards.clip_range",),
         f"rewards.clip_range: got {clip}, expected (lowest, highest)"),
        (sampled % group != 0, ("batch_size", "rollout.steps_per_generation", "rollout.num_generations"),
         f"batch_size x rollout.steps_per_generation = {sampled} completions are no whole groups of "
         f"rollout.num_generations = {group}"),
        (prompt + longest > c.max_length, ("max_length", "rollout.max_completion_length", "data.max_prompt_length"),
         f"max_length = {c.max_length} (prompt and completion) has no room for {prompt} prompt tokens and "
         f"rollout.max_completion_length = {longest}"),
        ((r.min_completion_length or 1) > longest, ("rollout.min_completion_length", "rollout.max_completion_length"),
         f"rollout.min_completion_length = {r.min_completion_length} is more than max_completion_length = {longest}"),
        (r.min_new_tokens > longest, ("rollout.min_new_tokens", "rollout.max_completion_length"),
         f"rollout.min_new_tokens = {r.min_new_tokens} is more than rollout.max_completion_length = {longest}"),
        (group == 1 and bool(r.resample), ("rollout.resample", "rollout.num_generations"),
         "rollout.resample replaces groups whose rewards are all alike, as those of one completion always are"),
        (group == 1 and POLICY[c.loss.name].estimator in ("group", "leave_one_out"),
         ("rollout.num_generations", "loss.name"),
         f"rollout.num_generations = 1, but {c.loss.name} compares a completion with others of its prompt: make 2 or "
         "more, or take reinforce or reinforce_pp"),
        (c.reference.mode == "cached", ("reference.mode",),
         "reference.mode=cached scores rows that are there before the run; completions are not: take live"),
        (c.loss.name == "reinforce" and r.steps_per_generation * r.num_iterations > 1,
         ("loss.name", "rollout.steps_per_generation", "rollout.num_iterations"),
         "reinforce corrects for no change of the policy since it sampled: make one update a rollout, or take "
         "reinforce_pp"),
        (c.data.weight is not None, ("data.weight",),
         f"data.weight: prompts have no weight in the loss {c.loss.name!r}; weigh by a reward, or repeat rows"),
    ]  # fmt: skip
    yield from ((names, text) for wrong, names, text in rules if wrong)


def _packing_contradictions(c: ConfigDict, kind: str | None) -> Iterator[Problem]:
    from jaxalign import objectives

    if c.data.packing == "off":
        return
    if c.data.prefixes:
        text = "data.prefixes is for rows that are not packed: data.packing=shared lets all prompts stand once"
        yield ("data.prefixes", "data.packing"), text
    if c.data.packing == "shared" and kind is not None and objectives.WIDTHS[kind] == 1:
        text = f"data.packing=shared, but an example of the loss {c.loss.name!r} has one sequence: set it to on"
        yield ("data.packing", "loss.name"), text
    if c.data.packing == "shared" and c.model.attention not in ("auto", "xla"):
        text = f"data.packing=shared needs model.attention=xla, not {c.model.attention}; or set data.packing to on"
        yield ("data.packing", "model.attention"), text


def _best_contradictions(c: ConfigDict, given: Given) -> Iterator[Problem]:
    best, stopping = c.checkpoint, c.early_stopping
    wanted = [("early_stopping.metric", stopping.metric, "early_stopping.mode", stopping.mode)]
    if c.checkpoint.keep_best:
        wanted.append(("checkpoint.best_metric", best.best_metric, "checkpoint.best_mode", best.best_mode))
        if c.checkpoint.best_metric is None:
            metric = "eval_reward" if _known_terms(c)[0] == "prompts" else "eval_loss"
            yield ("checkpoint.best_metric",), f"checkpoint.keep_best needs checkpoint.best_metric, e.g. {metric}"
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


def inert(c: ConfigDict, given: Given) -> Iterator[Problem]:
    """Keys away from their default that change nothing, given the others."""
    from jaxalign import objectives
    from jaxalign.losses import POLICY

    kind, terms = _known_terms(c)
    taken = {f"loss.{option}" for term in terms for option in objectives.options_of(term)}
    of_loss = [name for name in _section("loss") if name not in ("loss.name", "loss.weights", *taken)]
    options = _optimizer_options(c.optim.name)
    of_optimizer = [name for name in _OPTIMIZER_KEYS if options is not None and name.partition(".")[2] not in options]
    no_eval = not _names_eval(c) and not given.eval_dataset
    of_sampled = ["eval.num_generations", "eval.temperature"]
    rules: list[tuple[bool, Sequence[str], str]] = [
        *((bool(terms), [name], f"loss {c.loss.name!r} doesn't take it, only {_takers(name)}") for name in of_loss),
        (kind not in (None, "chats"), ["data.train_on"], f"loss {c.loss.name!r} scores responses"),
        (kind not in (None, "prompts"), [*_section("rollout"), *_section("rewards"), *of_sampled],
         f"loss {c.loss.name!r} learns from the data's responses and samples none"),
        (kind == "prompts", ["data.on_long", "eval.batch_size"], f"loss {c.loss.name!r} takes prompts, whole ones"),
        (bool(terms) and "attributes" not in terms, ["data.score_columns"], "only the loss attributes learns scores"),
        (not is_function(c.data.format), ["data.format_options"], f"data.format = {c.data.format!r} is no function"),
        (c.data.packing == "off", ["data.packed_length"], "data.packing is off"),
        (c.data.packing != "off", ["data.buckets"], "packed rows have one length: data.packed_length"),
        (not is_lora(c), [*_section("lora", without="rank"), "model.quantize"], "lora.rank is 0: all is trained"),
        (c.lora.path is not None, [f"lora.{name}" for name in ("alpha", "targets", "rslora", "modules_to_save")],
         f"the adapter {c.lora.path!r} has its own"),
        ("loss.f_alpha_divergence_coef" in taken and c.loss.f_divergence_type != "alpha_divergence",
         ["loss.f_alpha_divergence_coef"], f"loss.f_divergence_type is {c.loss.f_divergence_type}"),
        (bool(terms) and not needs_reference(c), _section("reference"), f"loss {c.loss.name!r} has no reference"),
        (kind == "prompts" and not needs_reference(c), ["loss.use_bias_correction_kl"], "there is no loss.beta"),
        (kind == "prompts" and not c.loss.importance_sampling_correction,
         [f"loss.importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max")],
         "loss.importance_sampling_correction is false"),
        (kind == "prompts" and any(POLICY[term].estimator != "group" for term in terms),
         ["rewards.scale", "rewards.aggregation"], f"loss {c.loss.name!r} compares rewards in its own way"),
        (kind == "prompts" and any(POLICY[term].estimator in ("group", "reinforce_pp") for term in terms),
         ["rewards.normalize_advantages"], f"loss {c.loss.name!r} divides by a standard deviation of its own"),
        (c.rewards.aggregation == "normalize_then_sum", ["rewards.clip_range"],
         "rewards.aggregation is normalize_then_sum: no sum of rewards is looked at"),
        ("+" not in c.loss.name, ["loss.weights"], f"loss.name = {c.loss.name!r} has one term"),
        (True, of_optimizer, f"optimizer {c.optim.name!r} doesn't take it"),
        (c.optim.name == "adam", ["optim.weight_decay"], "optimizer 'adam' has no decay; adamw is adam with it"),
        (c.optim.schedule == "constant", ["optim.final_ratio"], "optim.schedule is constant"),
        (not c.reference.sync_every, ["reference.sync_alpha"], "reference.sync_every is 0"),
        (not c.checkpoint.keep_best, ["checkpoint.best_metric", "checkpoint.best_mode"], "checkpoint.keep_best is 0"),
        (no_eval, _section("eval"),
         "there is no evaluation data (data.eval.path, data.eval.split or data.eval.fraction)"),
        (not c.samples.prompts, _section("samples", without="prompts"), "samples.prompts is 0"),
        (c.early_stopping.metric is None, _section("early_stopping"), "early_stopping.metric is None"),
        (not c.export.enabled, _section("export", without="enabled"), "export.enabled is false"),
    ]  # fmt: skip
    values = flatten(c)
    for wrong, names, why in rules:
        for name in names if wrong else ():
            if values[name] != BY_NAME[name].default:
                yield (name,), f"{name} = {values[name]!r} has no effect: {why}"


def _section(name: str, without: str = "") -> list[str]:
    return [key.name for key in KEYS if key.name.startswith(f"{name}.") and key.name != f"{name}.{without}"]


_OPTIMIZER_KEYS = ("optim.b1", "optim.b2", "optim.eps", "optim.momentum", "optim.moments_dtype")


def _names_eval(c: ConfigDict) -> bool:
    return bool(c.data.eval.path or c.data.eval.split or c.data.eval.fraction)


def _known_terms(c: ConfigDict) -> tuple[str | None, list[str]]:
    """The kind of examples and the terms of a loss.name that stands; (None, []) for one that doesn't."""
    from jaxalign import objectives

    terms = c.loss.name.split("+")
    try:
        objectives.check_names(terms)
    except ValueError:
        return None, []
    return objectives.kind_of(terms), terms


def _takers(key: str) -> str:
    """The losses that take the option `key`."""
    from jaxalign import objectives

    return ", ".join(objectives.takers(key.removeprefix("loss.")))


def _optimizer_options(name: str) -> frozenset[str] | None:
    """The keywords of `optim.` that an optimizer takes; None for a name that doesn't exist."""
    from jaxalign import optim

    return frozenset(optim.options(name)) if name in optim.OPTIMIZERS else None
