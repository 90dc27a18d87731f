"""The keys of a run's config: each with its default, its type, its range and what it does; and how a value is read.

`config.py` builds configs from them and judges how they stand together.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxalign.messages import did_you_mean


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
    Key("workdir", None, str | None, "Folder of the run, on a disk that all hosts see or in a bucket (gs://...): "
        "checkpoints, metrics.jsonl, config.json, export. None: runs/<name of the config file>."),
    Key("steps", None, int | None, "Optimizer updates to make; give either steps or epochs.", range="[1, inf)"),
    Key("epochs", None, float | None, "Passes over the training data; a fraction is allowed.", range="(0, inf)"),
    Key("seed", 0, int, "Seed of the order of the data, of sampling and of random weights.", range="[0, 2147483647]"),
    Key("batch_size", 64, int, "Examples (pairs, or rows for losses without pairs) per update, over all devices and "
        "all accumulation steps.", range="[1, inf)"),
    Key("gradient_accumulation_steps", 1, int, "Micro-batches that one update is split into; must divide batch_size. "
        "Changes memory, not the result.", range="[1, inf)"),
    Key("max_length", 1024, int, "Tokens of prompt + response that a row may have at most.", range="[2, inf)"),
    Key("resume", "auto", str, "auto: continue from workdir's last checkpoint if there is one. force: also when model, "
        "data, loss, optimizer or batch keys changed. never: refuse a workdir that holds a run.",
        choices=("auto", "force", "never")),
    Key("compilation_cache", "auto", str, "Folder of JAX's compilation cache; auto: a private one in the user's cache "
        "folder; none: off."),
    Key("watchdog_minutes", 30.0, float, "When no step (and no batch of an evaluation) was finished for so long, every "
        "process prints its stacks and exits 76; 0: never.", range="[0, inf)"),

    Key("model.path", None, str | None, "Folder (config.json + safetensors; gs:// too), GGUF file, hub id (or "
        "hf://ID@REVISION, read in place), or package:NAME[/FILE] for a file inside an installed Python package."),
    Key("model.random", None, dict | None, "Fields of a Hugging Face config.json: train this model from random weights "
        "instead of model.path; needs tokenizer.path."),
    Key("model.compute_dtype", "auto", str, "dtype of activations and matrix products (master weights are float32); "
        "auto: bfloat16 on accelerators, float32 on CPU.", choices=("auto", *_DTYPES)),
    Key("model.remat", "auto", str, "What the backward pass recomputes instead of keeping. none: nothing, full: every "
        "layer, dots: all but matrix products, dots_no_batch: all but products with weights.",
        choices=("auto", "none", "dots", "dots_no_batch", "full")),
    Key("model.attention", "auto", str, "How attention is computed. splash: JAX's TPU kernel, cudnn: cuDNN's on NVIDIA "
        "GPUs, xla: anywhere, with all scores in memory; auto: the kernel where it can run (the log says why not).",
        choices=("auto", "xla", "splash", "cudnn")),

    Key("model.quantize", None, str | None, "Keep the frozen weights of a LoRA run in 8 bits (int8) or 4 (nf4: QLoRA).",
        choices=("int8", "nf4")),

    Key("lora.rank", 0, int, "Train low-rank adapters of this rank beside frozen weights (LoRA); 0: train all weights.",
        range="[0, inf)"),
    Key("lora.alpha", None, float | None, "An adapter's output is scaled by alpha / rank. None: 2 x rank.",
        range="(0, inf)"),
    Key("lora.targets", ("all-linear",), tuple[str, ...], "Projections that get an adapter: names (q_proj), regexes of "
        "whole paths, or all-linear (all seven)."),
    Key("lora.dropout", 0.0, float, "Share of an adapter's inputs that is dropped in training.", range="[0, 1)"),
    Key("lora.rslora", False, bool, "Scale by alpha / sqrt(rank) instead (rsLoRA)."),
    Key("lora.modules_to_save", (), tuple[str, ...], "Modules trained whole beside the adapters, e.g. embed_tokens, "
        "lm_head."),
    Key("lora.path", None, str | None, "PEFT folder of an adapter to begin with; rank, alpha and targets are its own."),

    Key("tokenizer.path", None, str | None, "Folder, GGUF file, hub id or package:NAME/FILE; bytes: the built-in byte "
        "tokenizer. None: the model's own."),
    Key("tokenizer.chat_template", None, str | None, "Chat template: Jinja text, a file, or a name (chatml). None: the "
        "tokenizer's own."),
    Key("tokenizer.special_tokens", None, dict | None, "Special tokens to set, e.g. {'eos_token': '<|im_end|>'}; one "
        "that is new is added."),
    Key("tokenizer.add_tokens", (), tuple[str, ...], "Tokens to add; the embedding grows by rows of its mean."),

    Key("data.path", None, str | None, "Training rows: a file (json, jsonl, csv, parquet; also .gz) or a glob (gs:// "
        "too), a folder of a data set, a hub id, or package:NAME/FILE."),
    Key("data.split", None, str | None, "Split of a data set that has several. None: train."),
    Key("data.name", None, str | None, "Configuration (subset) of a hub data set."),
    Key("data.format", "auto", str, "How a row is read; auto: by its columns. Or FILE.function beside the config that "
        "makes other rows of them first."),
    Key("data.format_options", None, dict | None, "What such a function, if it is called as Axolotl does, finds in "
        "cfg['datasets'][0]."),
    Key("data.train_on", "assistant", str, "sft, dft: score all turns of the assistant, its last, or all tokens.",
        choices=("assistant", "last", "all")),
    Key("data.weight", None, str | None, "Weight of each example: a column, or FILE.function(rows, step) -> floats "
        "beside the config. None: 1 each."),
    Key("data.score_columns", (), tuple[str, ...], "attributes: the columns of the scores, one for each head."),
    Key("data.packing", "off", str, "Put several examples into a row. on: each sequence apart; shared: the prompt of "
        "an example's sequences stands once (attention by XLA).", choices=("off", "on", "shared")),
    Key("data.packed_length", None, int | None, "Tokens of a packed row. None: as many as the longest example needs, "
        "at least max_length.", range="[2, inf)"),
    Key("data.on_long", "truncate", str, "Rows above max_length: truncate (keeps the response's beginning) or drop.",
        choices=("truncate", "drop")),
    Key("data.max_prompt_length", None, int | None, "Rows with a longer prompt are dropped; a prompt is never cut.",
        range="[1, inf)"),
    Key("data.max_dropped_share", 0.1, float, "A run that would drop more than this share of its rows refuses to "
        "start; those that the format's function leaves out don't count.", range="[0, 1]"),
    Key("data.prefixes", (), tuple[int, ...], "Prompt tokens that a pair's sides share and that are computed once: of "
        "these lengths the longest that all prompts of a batch reach; (): none. Saves that part of a step; one "
        "compilation each.", range="[1, inf)"),
    Key("data.buckets", (), tuple[int, ...], "Row lengths to pad to, ascending, the last at least max_length; (): "
        "chosen automatically. One compilation each.", range="[1, inf)"),
    Key("data.max_rows", None, int | None, "Use only the first rows of the data.", range="[1, inf)"),
    Key("data.cache_dir", None, str | None, "Folder of tokenized rows and of cached reference log-probs; gs:// too. "
        "None: a private one in the user's cache folder."),
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

    Key("loss.name", "sigmoid", str, "The objective, or a sum such as sigmoid+sft. Pairs against a reference: sigmoid "
        "(DPO), hinge, ipo, robust, sigmoid_norm, exo_pair, discopop, nca_pair, bco_pair, sppo_hard, apo_zero, "
        "apo_down, aot, aot_unpaired; without one: orpo, simpo, cpo, cpo_hinge, cpo_ipo, and with a third response "
        "tpo, tpo_hinge, tpo_ipo, tpo_l. Labelled responses: kto, apo_zero_unpaired, bco. Chats and texts: sft, dft. "
        "Reward models: reward (pairs), attributes (scores). Prompts, to which the policy samples completions that "
        "rewards.* judge: grpo, dr_grpo, dapo, bnpo, cispo, luspo, sapo, vespo, gspo, gmpo, rloo, reinforce, "
        "reinforce_pp."),
    Key("loss.weights", (), tuple[float, ...], "Weights of the terms of a sum, in its order; (): 1 each."),
    Key("loss.beta", None, float | None, "Strength of the pull towards the reference (ipo: its tau; simpo, cpo: scale "
        "of the rewards; orpo: weight beside the NLL). None: the loss's own (simpo, tpo_l 2, tpo 0.01, rloo 0.05, "
        "other losses of prompts 0: no reference; the rest 0.1).", range="[0, inf)"),
    Key("loss.label_smoothing", None, float | None, "Probability that a label is swapped (sigmoid: conservative DPO; "
        "robust, exo_pair: their epsilon). None: the loss's own (exo_pair 0.001, others 0).", range="[0, 0.5)"),
    Key("loss.length_normalize", True, bool, "ipo: compare averages over tokens instead of sums."),
    Key("loss.discopop_tau", 0.05, float, "discopop: how softly its two parts give way to each other.",
        range="(0, 1]"),
    Key("loss.f_divergence_type", "reverse_kl", str, "Divergence that holds the policy to its reference, for losses of "
        "the pair's margin (sigmoid to discopop).",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")),
    Key("loss.f_alpha_divergence_coef", 0.5, float, "alpha_divergence: its alpha (1: reverse_kl, 0: forward_kl)."),
    Key("loss.ld_alpha", None, float | None, "Weight, in every log-prob, of tokens beyond the length of the pair's "
        "shorter response (LD-DPO). None: 1.", range="[0, 1]"),
    Key("loss.use_weighting", False, bool, "Weight pairs by how likely the policy is to give their responses (WPO)."),
    Key("loss.gamma_beta_ratio", 0.5, float, "simpo, tpo_l: target margin over beta, in nats a token.",
        range="[0, inf)"),
    Key("loss.alpha", 0.0, float, "simpo and cpo*: alpha of AlphaPO's reward (1 - p^-alpha) / alpha; 0: log p."),
    Key("loss.cpo_alpha", None, float | None, "simpo and cpo*: weight of the chosen responses' token NLL. None: the "
        "loss's own (simpo 0, others 1).", range="[0, inf)"),
    Key("loss.desirable_weight", 1.0, float, "kto: weight of the desirable responses' losses.", range="[0, inf)"),
    Key("loss.undesirable_weight", 1.0, float, "kto: weight of the undesirable responses' losses.", range="[0, inf)"),
    Key("loss.tpo_alpha", 1.0, float, "tpo*: weight of the reference responses' token NLL.", range="[0, inf)"),
    Key("loss.center_rewards_coefficient", 0.0, float, "reward: weight of the squared sum of a pair's rewards, which "
        "holds them around 0.", range="[0, inf)"),
    Key("loss.reward_weights", (), tuple[float, ...], "attributes: what each score counts in the one reward; a harmful "
        "attribute's is negative. (): their mean."),
    Key("loss.epsilon", None, float | None, "Losses of prompts that clip: how far below 1 (gmpo: e^-epsilon) an "
        "importance ratio counts. None: the loss's own (gspo 0.0003, gmpo 0.4, others 0.2).", range="(0, inf)"),
    Key("loss.epsilon_high", None, float | None, "The same above 1; cispo: the largest ratio. None: the loss's own "
        "(gspo 0.0004, cispo 5, others epsilon).", range="(0, inf)"),
    Key("loss.delta", None, float | None, "Bound of the ratio where the advantage is negative; more than 1 + "
        "epsilon_high. None: none.", range="(0, inf)"),
    Key("loss.importance_sampling_level", None, str | None, "Importance ratios: of each token, or the mean of a "
        "sequence (sequence_token: with each token's own gradient). None: the loss's own (gspo, luspo sequence, others "
        "token).",
        choices=("token", "sequence", "sequence_token")),
    Key("loss.use_bias_correction_kl", True, bool, "Multiply the KL term by the importance ratio: its gradient is that "
        "of the KL divergence then."),
    Key("loss.mask_truncated_completions", False, bool, "Completions without an end count nowhere."),
    Key("loss.top_entropy_quantile", 1.0, float, "Share of the tokens, those of the highest entropy, that count in the "
        "loss; costs a forward pass where the batch is split.", range="[0, 1]"),
    Key("loss.entropy_coef", 0.0, float, "Weight of the mean entropy, which is taken off the loss."),
    Key("loss.off_policy_mask_threshold", None, float | None, "Completions with a negative advantage whose mean "
        "log-prob fell by more than this since they were sampled count nothing. None: all count.", range="[0, inf)"),
    Key("loss.importance_sampling_correction", False, bool, "Correct for a sampler whose log-probs differ from the "
        "model's (samples from elsewhere; the sampler here is the model)."),
    Key("loss.importance_sampling_mode", None, str | None, "That ratio: of a token or a sequence, cut to the bounds "
        "(truncate) or 0 outside of them (mask). None: the loss's own (vespo token_truncate, others sequence_mask).",
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
    Key("loss.importance_sampling_clip_min", None, float | None, "Its lower bound. None: none.", range="[0, inf)"),
    Key("loss.importance_sampling_clip_max", 3.0, float, "Its upper bound; inf: none.", range="(0, inf]"),
    Key("loss.sapo_temperature_pos", 1.0, float, "sapo: how sharp its gate is where the advantage is positive.",
        range="(0, inf)"),
    Key("loss.sapo_temperature_neg", 1.05, float, "sapo: the same where it is not.", range="(0, inf)"),
    Key("loss.vespo_k_pos", 2.0, float, "vespo: how fast completions that became unlikely stop to count, where the "
        "advantage is not negative.", range="(0, inf)"),
    Key("loss.vespo_lambda_pos", 3.0, float, "vespo: the same for those that became likely.", range="(0, inf)"),
    Key("loss.vespo_k_neg", 3.0, float, "vespo: vespo_k_pos where the advantage is negative.", range="(0, inf)"),
    Key("loss.vespo_lambda_neg", 2.0, float, "vespo: vespo_lambda_pos where the advantage is negative.",
        range="(0, inf)"),

    Key("rollout.num_generations", 8, int, "Completions sampled of each prompt: a group.", range="[1, inf)"),
    Key("rollout.steps_per_generation", 1, int, "Updates that the completions sampled at once are split into; one "
        "update sees batch_size of them (TRL counts micro-batches: its number over gradient_accumulation_steps).",
        range="[1, inf)"),
    Key("rollout.num_iterations", 1, int, "Passes over the completions sampled at once, each in an order of its own.",
        range="[1, inf)"),
    Key("rollout.max_completion_length", 256, int, "Tokens of a completion at most (with rollout.function: of one "
        "generation).", range="[1, inf)"),
    Key("rollout.min_completion_length", None, int | None, "Each completion's own limit is drawn from this to "
        "max_completion_length (a length sampler, as PPO recipes have it). None: it is max_completion_length.",
        range="[1, inf)"),
    Key("rollout.min_new_tokens", 0, int, "No stop id before so many tokens.", range="[0, inf)"),
    Key("rollout.temperature", 1.0, float, "Sampling temperature; the loss divides the logits by it as well.",
        range="(0, inf)"),
    Key("rollout.top_k", 0, int, "Sample from the k likeliest tokens only; 0: off.", range="[0, inf)"),
    Key("rollout.top_p", 1.0, float, "Sample from the likeliest tokens that hold this probability; 1: off.",
        range="(0, 1]"),
    Key("rollout.min_p", 0.0, float, "Leave out tokens below this share of the likeliest one's probability; 0: off.",
        range="[0, 1]"),
    Key("rollout.repetition_penalty", 1.0, float, "Lowers logits of tokens that were there already; 1: off.",
        range="(0, inf)"),
    Key("rollout.stop", (), tuple[str, ...], "Texts that end a completion, beside the model's stop ids."),
    Key("rollout.slots", None, int | None, "Completions decoded at once; a finished one makes room for the next. "
        "None: all.", range="[1, inf)"),
    Key("rollout.resample", 0, int, "Groups whose completions all have one reward are replaced by those of new "
        "prompts, in so many rounds at most (DAPO's dynamic sampling).", range="[0, inf)"),
    Key("rollout.function", None, str | None, "FILE.function(generate, rows) -> (token ids, mask) of each row, beside "
        "the config: several turns and tools (or another sampler: with log-probs). None: one completion."),
    Key("rollout.show_every", 10, int, "Steps between groups that are shown and written to completions.jsonl; 0: "
        "never.", range="[0, inf)"),

    Key("rewards.functions", (), tuple[str, ...], "What rewards completions: names of jaxalign.rewards, FILE.function "
        "beside the config, package.module.function (TRL's signature), or model:PATH of a reward model."),
    Key("rewards.weights", (), tuple[float, ...], "What each reward counts; (): 1 each."),
    Key("rewards.options", None, dict | None, "Keywords of rewards by name, e.g. {'length': {'target': 64}}."),
    Key("rewards.scale", "group", str, "What advantages are divided by: the standard deviation of their group's "
        "rewards, of the whole batch's, or nothing (TRL's scale_rewards).", choices=("group", "batch", "none")),
    Key("rewards.aggregation", "sum_then_normalize", str, "Several rewards: summed, then compared within the group; or "
        "compared one by one, then summed (TRL's multi_objective_aggregation).",
        choices=("sum_then_normalize", "normalize_then_sum")),
    Key("rewards.normalize_advantages", False, bool, "rloo, reinforce: advantages less their mean over the batch, over "
        "their standard deviation."),
    Key("rewards.clip_range", (), tuple[float, ...], "(lowest, highest) that the sum of a completion's rewards counts "
        "as (TRL's reward_clip_range); (): any."),
    Key("rewards.timeout", 60.0, float, "Seconds that a call of a user's reward may take.", range="(0, inf)"),
    Key("rewards.workers", 1, int, "Processes on each host that share the completions of a shipped reward; a user's "
        "own function sees a batch whole, in one process.", range="[1, inf)"),
    Key("rewards.memory_gb", 4.0, float, "Memory that such a process may take.", range="(0, inf)"),
    Key("rewards.max_error_rate", 0.5, float, "A run stops where a reward fails on more than this share of a batch.",
        range="[0, 1]"),

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
    Key("eval.num_generations", 1, int, "Completions of each evaluation prompt, for losses that sample.",
        range="[1, inf)"),
    Key("eval.temperature", None, float | None, "At which they are sampled; 0: greedy. None: rollout.temperature.",
        range="[0, inf)"),
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

BY_NAME = {key.name: key for key in KEYS}


def members(kind: Any) -> tuple[Any, ...]:
    """The types that a union is made of; a type that is none stands alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def type_name(kind: Any) -> str:
    """A key's type as messages and the table say it."""
    names = {type(None): "None", tuple[int, ...]: "(int, ...)", tuple[float, ...]: "(float, ...)",
             tuple[str, ...]: "(str, ...)"}  # fmt: skip
    return " or ".join(names.get(member) or member.__name__ for member in members(kind))


def unknown(name: str) -> str:
    """The message about a key that doesn't exist."""
    if "vllm" in name.lower():
        return (
            f"there is no key {name!r}: no generation server is needed, a run samples with its own weights on its own "
            "mesh (rollout.*). Leave it out"
        )
    hint = "".join(f"; did you mean {key!r}?" for key in nearest(name))
    return f"there is no key {name!r}{hint} (--help_config lists all)"


def nearest(name: str) -> list[str]:
    """The key (or none) that `name` was meant for: similar as a whole, or the same last part or its initials."""
    last = name.rpartition(".")[2]
    fields = {key: key.rpartition(".")[2] for key in BY_NAME}
    same = [key for key, field in fields.items() if last in (field, "".join(word[:1] for word in field.split("_")))]
    close, far = (difflib.get_close_matches(name, BY_NAME, 1, cutoff) for cutoff in (0.8, 0.5))
    return close or same[:1] or far


def from_text(key: Key, text: str) -> Any:
    """What the text of an override means for a key of its type; ValueError if it means nothing."""
    kinds = members(key.type)
    lowered = text.strip().lower()
    if type(None) in kinds and lowered in ("none", "null", ""):
        return None
    if bool in kinds and lowered in ("true", "false"):
        return lowered == "true"
    for member in kinds:
        if member in (int, float):
            try:
                return member(text)
            except ValueError:
                continue
        origin = typing.get_origin(member)
        if origin is tuple and text[:1] in ("(", "["):
            return literal(text)
        if origin is tuple:
            item = typing.get_args(member)[0]
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return [from_text(Key(key.name, None, item, ""), part) for part in parts]
        if member is dict:
            return literal(text)
        if member is str:
            return text
    raise ValueError(f"{key.name}: got {text!r}, expected {type_name(key.type)}")


def literal(text: str) -> Any:
    """The Python literal that a text is; the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def coerce(key: Key, value: Any) -> Any:
    """The value as the key's type has it, or an error that names key, value and what was expected."""
    fits, result = _fit(value, key.type)
    if not fits:
        raise ValueError(f"{key.name}: got {value!r} ({type(value).__name__}), expected {type_name(key.type)}")
    if key.choices and result is not None and result not in key.choices:
        hint = did_you_mean(result, key.choices)
        raise ValueError(f"{key.name}: got {result!r}, expected one of {', '.join(key.choices)}{hint}")
    for number in result if isinstance(result, tuple) else (result,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not _in_range(number, key.range):
            interval = key.range or "(-inf, inf)"
            raise ValueError(f"{key.name}: got {value!r}, expected {type_name(key.type)} in {interval}")
    return result


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value as that type has it (int -> float, list -> tuple)."""
    for member in members(kind):
        if typing.get_origin(member) is tuple and isinstance(value, list | tuple):
            items = [_fit(item, typing.get_args(member)[0]) for item in value]
            if all(fits for fits, _ in items):
                return True, tuple(item for _, item in items)
        elif member is dict and isinstance(value, Mapping | ConfigDict):
            return True, plain(value)
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


def plain(value: Any) -> Any:
    """Without ConfigDicts and lists, so that values compare by content."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    return value


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"a.b": plain value}; a key whose type is dict keeps its dict, an empty section has no entry."""
    flat: dict[str, Any] = {}
    for field, value in config.items():
        name = f"{prefix}{field}"
        if isinstance(value, Mapping | ConfigDict) and name not in BY_NAME:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = plain(value)
    return flat


def nest(flat: Mapping[str, Any]) -> ConfigDict:
    """The ConfigDict of {"a.b": value}. Not type-safe: None -> number and int -> tuple are judged by `coerce`."""
    config = ConfigDict(type_safe=False, convert_dict=False)  # a dict's own names may have dots
    for name, value in flat.items():
        *sections, field = name.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ConfigDict(type_safe=False, convert_dict=False)
            node = node[section]
        node[field] = value
    return config
