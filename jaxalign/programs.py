"""From a checked config to what can be said of a run without its data and weights: model, objective, jitted functions.

What can fail for the user's reasons (paths, names, lengths) fails here or in build.py, before anything is compiled.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxalign import config as config_lib
from jaxalign import frozen, hf, lora, models, objectives, optim, peft_files, reference, sharding, xla_flags
from jaxalign import step as step_lib
from jaxalign.data.tokenizers import Lazy
from jaxalign.models import attention
from jaxalign.models.config import ModelConfig


def load_tokenizer(config: ConfigDict) -> tuple[Any, str]:
    """The run's tokenizer, which is not read yet, and the path that it comes from."""
    path = config.tokenizer.path or config.model.path
    changes = {"chat_template": config.tokenizer.chat_template, **_added(config)}
    return Lazy(hf.tokenizer_identity(path, **changes), functools.partial(hf.load_tokenizer, path, **changes)), path


def _added(config: ConfigDict) -> dict[str, Any]:
    """What tokenizer.* adds to a tokenizer, so that a model may have to grow."""
    special = config.tokenizer.special_tokens
    return {"special_tokens": special and dict(special), "add_tokens": config.tokenizer.add_tokens}


def model_config(config: ConfigDict, *, path: str | None, platform: str | None = None) -> ModelConfig:
    """The ModelConfig of model.path (or another `path`), or of model.random, and how it is run on `platform`."""
    cfg = models.config_from_hf(config_lib.plain(config.model.random)) if path is None else hf.read_config(path)
    if any(_added(config).values()) and (config.tokenizer.path or config.model.path):
        cfg = hf.fit_to_tokenizer(cfg, load_tokenizer(config)[0], **_added(config))
    on_cpu = (platform or jax.default_backend()) == "cpu"
    dtype, remat = config.model.compute_dtype, config.model.remat
    labels = tuple(config.data.score_columns)
    is_scored = config_lib.head(config) == "score"
    return dataclasses.replace(
        cfg,
        num_labels=max(len(labels), 1) if is_scored else 0,
        labels=labels,
        reward_weights=tuple(config.loss.reward_weights) if is_scored else (),
        compute_dtype=("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype,
        # A laptop has memory for the products of its small batches; a chip that is filled with rows has not.
        remat=("dots_no_batch" if on_cpu else "full") if remat == "auto" else remat,
        attention=config.model.attention,
    )


def objective_of(config: ConfigDict, cfg: ModelConfig) -> Any:
    """The objective that loss.* names."""
    terms, options = config_lib.loss_arguments(config)
    if objectives.kind_of(terms) == "prompts":
        r = config.rollout
        options |= {"temperature": r.temperature, "max_completion_length": r.max_completion_length}
    return objectives.make(cfg, terms, **options)


def scored(config: ConfigDict, objective: Any) -> tuple[str, ...]:
    """The log-probs that a rollout of an objective of prompts is to have."""
    # The weights of the one update that a rollout serves are those that drew it.
    several = config.rollout.steps_per_generation * config.rollout.num_iterations > 1
    old, ref = several or objective.kl_in_reward, objective.needs_reference
    return ("old_logps",) * old + ("ref_logps",) * ref


def has_sampling_logps(config: ConfigDict) -> bool:
    """Whether batches of a rollout say how likely tokens were where they were sampled."""
    loss = config.loss
    compares = loss.importance_sampling_correction or loss.off_policy_mask_threshold is not None
    return bool(config.rollout.function is None or compares)


def longest_prompt(config: ConfigDict) -> int | None:
    """Tokens of a prompt at most, beyond which rows are dropped; None: as many as a row has."""
    if config.data.max_prompt_length is not None or config_lib.kind(config) != "prompts":
        return config.data.max_prompt_length
    return int(config.max_length - config.rollout.max_completion_length)


def adapters_of(config: ConfigDict, cfg: ModelConfig) -> lora.Spec | None:
    """The adapters that are trained; None where all weights are."""
    given = config.lora
    if not config_lib.is_lora(config):
        return None
    if given.path is not None:
        return dataclasses.replace(peft_files.read_config(given.path, cfg).spec, dropout=given.dropout)
    return lora.Spec(
        rank=given.rank,
        alpha=2.0 * given.rank if given.alpha is None else given.alpha,
        targets=tuple(given.targets),
        dropout=given.dropout,
        rslora=given.rslora,
        modules_to_save=tuple(given.modules_to_save),
    )


def check_model(cfg: ModelConfig, config: ConfigDict, vocab_size: int | None) -> None:
    """Raises ValueError where model, tokenizer (of `vocab_size`; None: not known) and lengths do not go together."""
    if vocab_size is not None and vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens and the model only {cfg.vocab_size}: "
            "tokenizer.path belongs to another model"
        )
    if config.data.prefixes and any(cfg.sliding_windows):
        raise ValueError("data.prefixes: shared prompts do not go with a model that has sliding windows; set it to ()")
    if config.max_length > cfg.max_position_embeddings:
        raise ValueError(
            f"max_length = {config.max_length} is more than the model's {cfg.max_position_embeddings} positions"
        )


class Programs:
    """The jitted functions of a run on one mesh, from its config and its models' shapes: no data, no weights.

    Attributes:
      config, mesh, cfg, ref_cfg, objective: as their names say; ref_cfg is the reference's model.
      attention: (implementation, reason), from `attention.choose`.
      steps: updates of the whole run.
      frozen: under LoRA the abstract frozen weights with the adapters' spec, with their shardings; else None.
      rows: of a global batch that is not packed; eval_examples: examples of an evaluation's batch.
      cached_reference: the reference scores all rows once, before the first step.
      schedule: update -> learning rate.
      state: the abstract TrainState with its shardings, for restoring.
      reference: the abstract weights of a fixed reference, with their shardings.
      train_step: jitted (state, frozen weights, batch) -> (state, metrics); the state is donated.
      score: jitted (reference weights, batch) -> ref_logps [R, T].
      score_once: the same of a batch that is no larger than a micro-batch.
      score_policy: the same with the policy's whole weights.
      examples: jitted (trainable weights, frozen ones, batch) -> values of each example on every device.
      sync: jitted state -> state with the reference moved; None for a fixed one.
    """

    def __init__(
        self, config: ConfigDict, mesh: jax.sharding.Mesh, cfg: ModelConfig, ref_cfg: ModelConfig, *, steps: int
    ):
        self.config, self.mesh, self.cfg, self.ref_cfg, self.steps = config, mesh, cfg, ref_cfg, steps
        self.attention = attention.choose(cfg, mesh)
        self.objective = objective_of(config, cfg)
        if config.data.packing == "shared" and not self.objective.shares_prompt:
            raise ValueError(
                f"data.packing=shared: the loss {config.loss.name!r} scores the prompt too, for which each sequence "
                "has to hold its own: set it to on"
            )
        spec = adapters_of(config, cfg)
        self.frozen: lora.Frozen | None = None
        self.rows = self.objective.width * config.batch_size
        self.cached_reference = config.reference.mode == "cached"
        self.eval_examples = config.eval.batch_size or config.batch_size // config.gradient_accumulation_steps
        o = config.optim.to_dict()
        self.schedule = optim.make_schedule(
            o["schedule"],
            o["learning_rate"],
            steps=steps,
            warmup_steps=o["warmup_steps"],
            warmup_ratio=o["warmup_ratio"],
            final_ratio=o["final_ratio"],
        )
        options = {name: o[name] for name in optim.options(o["name"]) if o[name] is not None}
        tx = optim.make_optimizer(o["name"], schedule=self.schedule, weight_decay=o["weight_decay"], **options)
        micro_batches = config.gradient_accumulation_steps
        step = step_lib.make_train_step(
            self.objective,
            tx,
            gradient_accumulation_steps=micro_batches,
            max_grad_norm=o["max_grad_norm"],
            nonfinite=o["nonfinite"],
            schedule=self.schedule,
            dropout_seed=config.seed if spec is not None and spec.dropout else None,
        )
        whole = sharding.replicated(mesh)
        self._model_shardings = sharding.param_shardings(mesh, models.declare(cfg))
        self._ref_shardings = sharding.param_shardings(mesh, models.declare(ref_cfg))
        if spec is None:
            params = models.abstract(cfg, np.float32, self._model_shardings)
        else:
            params = lora.abstract(cfg, spec, mesh)
            self.frozen = frozen.abstract(cfg, spec, mesh, config.model.quantize)
        self._shardings = jax.tree.map(lambda x: x.sharding, params)
        moving = config.reference.sync_every > 0

        def new_state(params: models.Params, ref_params: models.Params | None = None) -> step_lib.TrainState:
            aux = self.objective.init_aux()
            if moving:  # XLA gives each output its own buffer, so the reference may be the policy's first weights
                aux["reference"] = params if ref_params is None else ref_params
            return step_lib.init_state(params, tx, **aux)

        abstract = jax.eval_shape(new_state, params)
        shardings = abstract._replace(
            step=whole,
            params=self._shardings,
            opt_state=optim.state_shardings(tx, params),
            aux={name: self._shardings if name == "reference" else whole for name in abstract.aux},
        )
        self.state = _placed(abstract, shardings)
        if self.frozen is not None and config.reference.path is None:
            self.reference = self.frozen.base
        else:
            ref_params = models.abstract(ref_cfg)
            self.reference = _placed(
                jax.eval_shape(functools.partial(reference.frozen_copy, ref_cfg), ref_params), self._ref_shardings
            )
        self._new_state = jax.jit(new_state, donate_argnums=0, out_shardings=shardings)
        jit = functools.partial(jax.jit, compiler_options=xla_flags.options(mesh))
        self.train_step = jit(step, donate_argnums=0, out_shardings=(shardings, whole))
        # A policy is compared with its reference as it samples.
        temperature = config.rollout.temperature if self.objective.kind == "prompts" else 1.0
        score = functools.partial(reference.make_score, temperature=temperature)
        self.score = jit(
            score(ref_cfg, width=self.objective.width, micro_batches=micro_batches),
            out_shardings=sharding.row_sharding(mesh),
        )
        # Rows outside of training come in batches of a micro-batch's size already.
        self.score_once = jit(score(ref_cfg), out_shardings=sharding.row_sharding(mesh))
        self.score_policy = jit(score(cfg), out_shardings=sharding.row_sharding(mesh))
        self.examples = jit(self.objective.examples, out_shardings=whole)
        self.gradients = step_lib.make_gradients(self.objective, gradient_accumulation_steps=micro_batches)
        self.sync: Any = None
        if moving:

            def sync(state: step_lib.TrainState) -> step_lib.TrainState:
                old, halted = state.aux["reference"], state.aux["halted"]
                mixed = reference.mix(state.params, old, config.reference.sync_alpha)
                mixed = jax.tree.map(lambda new, old: jnp.where(halted, old, new), mixed, old)
                return state._replace(aux={**state.aux, "reference": mixed})

            self.sync = jax.jit(sync, donate_argnums=0, out_shardings=shardings)

    @property
    def live_reference(self) -> bool:
        """Whether a reference, fixed or moving, scores every training batch."""
        return self.objective.needs_reference and not self.cached_reference


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
