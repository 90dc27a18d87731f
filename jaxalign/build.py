"""From a checked config to the pieces of a run: data, model, objective, optimizer, and the jitted functions.

What can fail for the user's reasons (paths, rows, lengths, names) fails here, before anything is compiled.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxalign import config as config_lib
from jaxalign import hf, models, objectives, optim, reference, sharding, xla_flags
from jaxalign import step as step_lib
from jaxalign.data import batching, sources
from jaxalign.data.tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS, Lazy, byte_tokenizer
from jaxalign.models import attention
from jaxalign.models.config import ModelConfig
from jaxalign.paths import PathLike

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared rows of a run.

    Attributes:
      tokenizer: a transformers fast tokenizer, read when it is needed; `tokenizer_path` is where it comes from ("bytes"
        for the built-in one).
      train, held_out: prepared pairs; held_out is None without evaluation.
    """

    tokenizer: Any
    tokenizer_path: str
    train: sources.Prepared
    held_out: sources.Prepared | None

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """What a resumed run must find unchanged."""
        return {"train": self.train.fingerprint, "eval": None if self.held_out is None else self.held_out.fingerprint}


def load_tokenizer(config: ConfigDict) -> tuple[Any, str]:
    """The run's tokenizer, which is not read yet, and the path that it comes from."""
    path = config.tokenizer.path or config.model.path
    if path == "bytes":
        return Lazy(repr((path, SPECIAL_TOKENS, CHAT_TEMPLATE)), byte_tokenizer), path
    template = config.data.chat_template
    load = functools.partial(hf.load_tokenizer, path, chat_template=template)
    return Lazy(hf.tokenizer_identity(path, chat_template=template), load), path


def load_data(config: ConfigDict, dropped_path: PathLike | None, dataset: Any = None, eval_dataset: Any = None) -> Data:
    """Tokenized training and evaluation pairs; rows that can't be used are listed in `dropped_path` (or in the cache).

    Args:
      dataset, eval_dataset: rows in place of data.path and data.eval.path.

    Raises:
      ValueError: see `sources.prepare`; or evaluation rows were named twice.
    """
    tokenizer, path = load_tokenizer(config)
    prepare = functools.partial(
        sources.prepare,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.data.max_prompt_length,
        format=config.data.format,
        on_long=config.data.on_long,
        chat_template=config.data.chat_template,
        cache_dir=config.data.cache_dir,
        max_dropped_share=config.data.max_dropped_share,
        workers=config.data.workers,
    )
    source = config.data.path if dataset is None else dataset
    split = config.data.split if dataset is None else None
    train = prepare(source, split=split, name=config.data.name, limit=config.data.max_rows, dropped_path=dropped_path)
    held_out = None
    eval_path, eval_split = config.data.eval.path, config.data.eval.split
    if eval_dataset is not None:
        held_out = prepare(eval_dataset)
    elif eval_path or eval_split:
        held_out = prepare(eval_path or config.data.path, split=eval_split or config.data.split, name=config.data.name)
    elif config.data.eval.fraction:
        train, held_out = sources.split_by_hash(train, config.data.eval.fraction)
    return Data(tokenizer, path, train, held_out)


def model_config(config: ConfigDict, *, path: str | None, platform: str | None = None) -> ModelConfig:
    """The ModelConfig of model.path (or another `path`), or of model.random, and how it is run on `platform`."""
    cfg = models.config_from_hf(config.model.random.to_dict()) if path is None else hf.read_config(path)
    on_cpu = (platform or jax.default_backend()) == "cpu"
    dtype, remat = config.model.compute_dtype, config.model.remat
    return dataclasses.replace(
        cfg,
        compute_dtype=("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype,
        # A laptop has memory for the products of its small batches; a chip that is filled with rows has not.
        remat=("dots_no_batch" if on_cpu else "full") if remat == "auto" else remat,
        attention=config.model.attention,
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
      rows: of a global batch; eval_pairs: pairs of an evaluation's batch.
      cached_reference: the reference scores all rows once, before the first step.
      schedule: update -> learning rate.
      state: the abstract TrainState with its shardings, for restoring.
      reference: the abstract weights of a fixed reference, with their shardings.
      train_step: jitted (state, None, batch) -> (state, metrics); the state is donated.
      score: jitted (reference weights, batch) -> ref_logps [R, T].
      score_once: the same of a batch that is no larger than a micro-batch.
      examples: jitted (weights, None, batch) -> per-pair values on every device.
      sync: jitted state -> state with the reference moved; None for a fixed one.
    """

    def __init__(
        self, config: ConfigDict, mesh: jax.sharding.Mesh, cfg: ModelConfig, ref_cfg: ModelConfig, *, steps: int
    ):
        self.config, self.mesh, self.cfg, self.ref_cfg, self.steps = config, mesh, cfg, ref_cfg, steps
        self.attention = attention.choose(cfg, mesh)
        terms, options = config_lib.loss_arguments(config)
        self.objective = objectives.pairwise(cfg, terms, **options)
        self.rows = self.objective.rows_per_example * config.batch_size
        self.cached_reference = config.reference.mode == "cached"
        self.eval_pairs = config.eval.batch_size or config.batch_size // config.gradient_accumulation_steps
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
        )
        whole = sharding.replicated(mesh)
        self._shardings = sharding.param_shardings(mesh, models.declare(cfg))
        self._ref_shardings = sharding.param_shardings(mesh, models.declare(ref_cfg))
        params = models.abstract(cfg, np.float32, self._shardings)
        moving = config.reference.sync_every > 0

        def new_state(params: models.Params, ref_params: models.Params | None = None) -> step_lib.TrainState:
            if moving:  # XLA gives each output its own buffer, so the reference may be the policy's first weights
                return step_lib.init_state(params, tx, reference=params if ref_params is None else ref_params)
            return step_lib.init_state(params, tx)

        abstract = jax.eval_shape(new_state, params)
        shardings = abstract._replace(
            step=whole,
            params=self._shardings,
            opt_state=optim.state_shardings(tx, params),
            aux={name: self._shardings if name == "reference" else whole for name in abstract.aux},
        )
        self.state = _placed(abstract, shardings)
        ref_params = models.abstract(ref_cfg)
        self.reference = _placed(
            jax.eval_shape(functools.partial(reference.frozen_copy, ref_cfg), ref_params), self._ref_shardings
        )
        self._new_state = jax.jit(new_state, donate_argnums=0, out_shardings=shardings)
        jit = functools.partial(jax.jit, compiler_options=xla_flags.options(mesh))
        self.train_step = jit(step, donate_argnums=0, out_shardings=(shardings, whole))
        self.score = jit(
            reference.make_score(ref_cfg, micro_batches=micro_batches), out_shardings=sharding.row_sharding(mesh)
        )
        # Rows outside of training come in batches of a micro-batch's size already.
        self.score_once = jit(reference.make_score(ref_cfg), out_shardings=sharding.row_sharding(mesh))
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


class Run(Programs):
    """The pieces of one run on one mesh: its programs, data and weights; call under `jax.set_mesh(mesh)`.

    Attributes:
      data: as its name says.
      source: step -> host batch, with `ref_logps` where the reference is cached.
      begins_at_reference: the policy's first weights are the reference's.
      on_progress: called with what was finished, for a watchdog.
    """

    def __init__(self, config: ConfigDict, mesh: jax.sharding.Mesh, data: Data):
        self.data = data
        platform = mesh.devices.flat[0].platform
        cfg = model_config(config, path=config.model.path, platform=platform)
        check_model(cfg, config, data.train.meta["vocab_size"])
        ref_path = config.reference.path
        ref_cfg = cfg if ref_path is None else model_config(config, path=ref_path, platform=platform)
        check_model(ref_cfg, config, data.train.meta["vocab_size"])
        self.on_progress: Callable[[str], object] = lambda what: None

        self._buckets = tuple(config.data.buckets) or None
        pairs = batching.PairSource(
            data.train,
            batch_size=config.batch_size,
            seed=config.seed,
            buckets=self._buckets,
            prefixes=config.data.prefixes,
            rows=sharding.process_rows(mesh, 2 * config.batch_size),
        )
        self.source: Callable[..., Any] = pairs
        self.pairs_of = pairs.pairs_of
        super().__init__(config, mesh, cfg, ref_cfg, steps=config.steps or pairs.steps(config.epochs))
        self.begins_at_reference = ref_path is None and self.objective.needs_reference
        self._score_pairs = config.batch_size // config.gradient_accumulation_steps

    @functools.cached_property
    def _initial(self) -> models.Params:
        """The policy's first weights in float32, until `new_state` or `release` gives them up."""
        if self.config.model.path is not None:
            return self._load(self.config.model.path, self.cfg, self._shardings)
        init = jax.jit(functools.partial(models.init, self.cfg), out_shardings=self._shardings)
        return init(jax.random.key(self.config.seed))

    def _load(self, path: str, cfg: ModelConfig, shardings: Any) -> models.Params:
        began = time.perf_counter()
        params = hf.load(path, cfg, dtype="float32", shardings=shardings)[1]
        log.info("read %s in %.1f s", path, time.perf_counter() - began)
        return params

    @functools.cached_property
    def reference_params(self) -> models.Params:
        """The fixed reference's weights, in the compute dtype."""
        path = self.config.reference.path
        params = self._initial if path is None else self._load(path, self.ref_cfg, self._ref_shardings)
        return jax.jit(functools.partial(reference.frozen_copy, self.ref_cfg))(params)

    def new_state(self) -> step_lib.TrainState:
        """The state before the first step. The weights as they were read are given up to it."""
        if self._is_live:
            _ = self.reference_params  # its own copy, made while the weights are there
        moving = None
        if self.sync is not None and self.config.reference.path is not None:
            moving = self._load(self.config.reference.path, self.cfg, self._shardings)
        weights = self._initial
        del self.__dict__["_initial"]
        return self._new_state(weights, moving)

    def release(self) -> None:
        """Gives up the weights that no step needs; those that every step needs are read, if they were not yet."""
        if self._is_live:
            _ = self.reference_params
        else:
            self.__dict__.pop("reference_params", None)
        self.__dict__.pop("_initial", None)

    @property
    def _is_live(self) -> bool:
        """Whether a fixed reference scores every batch."""
        return self.live_reference and self.sync is None

    def reference_of(self, state: step_lib.TrainState) -> models.Params | None:
        """The weights that score a training batch; None where its ref_logps come with it or nothing asks for them."""
        if self.sync is not None:
            return state.aux["reference"]
        return self.reference_params if self.live_reference else None

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host batch of training on the mesh."""
        return reference.place(self.mesh, batch, self.rows)

    def score_reference(self, say: Callable[[str], None]) -> None:
        """Scores what is scored once: the training rows for reference.mode=cached, and the evaluation rows."""
        if self.cached_reference:
            lookup = self._cached(self.data.train, self._score_pairs, "training", say)
            rows = sharding.process_rows(self.mesh, self.rows)
            pairs = self.source

            def source(n: int, view: Any = None) -> Any:
                batch = pairs(n, view)
                return {**batch, "ref_logps": lookup(batch, rows)}

            self.source = source
        if self.data.held_out is not None:
            limit = self.config.eval.max_rows
            held_out = self.data.held_out
            self._eval_data = held_out if limit is None else held_out.select(np.arange(min(limit, len(held_out))))
            if self.objective.needs_reference and self.sync is None:
                self._eval_reference = self._cached(self._eval_data, self.eval_pairs, "evaluation", say)

    def reference_file(self, prepared: sources.Prepared) -> epath.Path:
        """Where the reference's log-probs of these pairs are kept: beside the tokenized rows."""
        path = self.config.reference.path
        model = self._policy_identity if path is None else self._identity(path)
        return reference.cache_file(self.data.train.kept_in, model=model, prepared=prepared, cfg=self.ref_cfg)

    def first_completions_file(self) -> epath.Path:
        """Where the completions of the untrained policy are kept: what they depend on is in the name."""
        samples = self.config.samples
        asked = [samples.prompts, samples.max_new_tokens, samples.temperature, self.config.seed]
        what = [reference.VERSION, self._policy_identity, self.data.fingerprint, self.cfg.compute_dtype, *asked]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        return self.data.train.kept_in / f"completions-{digest}.json"

    def _cached(
        self, prepared: sources.Prepared, pairs: int, what: str, say: Callable[[str], None]
    ) -> reference.Cached:
        def tell(done: int, total: int) -> None:
            self.on_progress(f"batch {done} of {total} of the {what} rows' reference")
            if done == 0:
                say(f"no cached reference log-probs fit model, data, template and length: scoring the {what} rows")
            elif done == total or done % max(1, total // 10) == 0:
                say(f"reference log-probs of the {what} rows: {done}/{total} batches")

        return reference.cached(
            self.reference_file(prepared),
            prepared,
            self.score_once,
            lambda: self.reference_params,
            mesh=self.mesh,
            batch_size=pairs,
            buckets=self._buckets,
            on_progress=tell,
        )

    @functools.cached_property
    def _policy_identity(self) -> str:
        return self._identity(self.config.model.path)

    def _identity(self, path: str | None) -> str:
        """Of the weights at `path`, or of the random ones."""
        if path is not None:
            return hf.fingerprint(path)
        random = {"seed": self.config.seed, "model": self.config.model.random.to_dict(), "jax": jax.__version__}
        return hashlib.sha256(json.dumps(random, sort_keys=True).encode()).hexdigest()

    def eval_batches(self, state: step_lib.TrainState, *, untrained: bool = False) -> Iterator[dict[str, jax.Array]]:
        """The fixed evaluation pairs on the mesh, with ref_logps if the loss needs them. After `score_reference`.

        Where the policy is `untrained` and so still the reference that has scored them, its log-probs come with them.
        """
        is_known = untrained and self.begins_at_reference
        n_rows = 2 * self.eval_pairs
        rows = sharding.process_rows(self.mesh, n_rows)
        batches = batching.EvalBatches(self._eval_data, batch_size=self.eval_pairs, buckets=self._buckets, rows=rows)
        for n in range(len(batches)):
            self.on_progress(f"batch {n} of {len(batches)} of an evaluation")
            batch = batches[n]
            if not self.objective.needs_reference:
                yield reference.place(self.mesh, batch, n_rows)
            elif self.sync is None:
                logps = self._eval_reference(batch, rows)
                known = {"logps": logps} if is_known else {}
                yield reference.place(self.mesh, {**batch, "ref_logps": logps, **known}, n_rows)
            else:
                placed = reference.place(self.mesh, batch, n_rows)
                yield {**placed, "ref_logps": self.score_once(state.aux["reference"], placed)}
