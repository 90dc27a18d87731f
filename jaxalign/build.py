"""From a checked config to the data, weights and batches of a run, on the programs of programs.py."""

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxalign import config as config_lib
from jaxalign import frozen, hf, lora, models, peft_files, programs, reference, rewards, rollout, sharding, user_code
from jaxalign import step as step_lib
from jaxalign.actor import Actor
from jaxalign.data import batching, sources
from jaxalign.models.config import ModelConfig
from jaxalign.paths import PathLike
from jaxalign.programs import Programs, check_model, load_tokenizer, model_config, objective_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared rows of a run.

    Attributes:
      tokenizer: a transformers fast tokenizer, read when it is needed; `tokenizer_path` is where it comes from ("bytes"
        for the built-in one).
      train, held_out: prepared examples; held_out is None without evaluation.
    """

    tokenizer: Any
    tokenizer_path: str
    train: sources.Prepared
    held_out: sources.Prepared | None

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """What a resumed run must find unchanged."""
        return {"train": self.train.fingerprint, "eval": None if self.held_out is None else self.held_out.fingerprint}


def load_data(config: ConfigDict, dropped_path: PathLike | None, dataset: Any = None, eval_dataset: Any = None) -> Data:
    """Tokenized examples of training and evaluation; rows that can't be used are in `dropped_path` (or in the cache).

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
        max_prompt_length=programs.longest_prompt(config),
        format=config.data.format,
        format_options=config_lib.plain(config.data.format_options),
        on_long=config.data.on_long,
        cache_dir=config.data.cache_dir,
        max_dropped_share=config.data.max_dropped_share,
        workers=config.data.workers,
        kind=config_lib.kind(config),
        train_on=config.data.train_on,
        score_columns=tuple(config.data.score_columns),
    )
    weight = None if user_code.is_function(config.data.weight) else config.data.weight
    source = config.data.path if dataset is None else dataset
    split = config.data.split if dataset is None else None
    train = prepare(
        source,
        split=split,
        name=config.data.name,
        limit=config.data.max_rows,
        dropped_path=dropped_path,
        weight_column=weight,
    )
    held_out = None
    eval_path, eval_split = config.data.eval.path, config.data.eval.split
    if eval_dataset is not None:
        held_out = prepare(eval_dataset)
    elif eval_path or eval_split:
        held_out = prepare(eval_path or config.data.path, split=eval_split or config.data.split, name=config.data.name)
    elif config.data.eval.fraction:
        train, held_out = sources.split_by_hash(train, config.data.eval.fraction)
    return Data(tokenizer, path, train, held_out)


def weigher(name: str | None, prepared: sources.Prepared) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """(examples, step) -> their weights, by the user's function `name`; None where it is no function's name."""
    if not user_code.is_function(name):
        return None
    assert name is not None
    function = user_code.load(name)

    def weigh(examples: np.ndarray, step: int) -> np.ndarray:
        weights = np.asarray(function([prepared.text(int(i)) for i in examples], step), np.float32)
        if weights.shape != (len(examples),) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(
                f"data.weight: {name} gave {weights!r} for {len(examples)} rows at step {step}, expected as many "
                "finite numbers from 0 up"
            )
        return weights

    return weigh


def make_actor(
    config: ConfigDict,
    cfg: ModelConfig,
    data: Data,
    mesh: jax.sharding.Mesh,
    on_progress: Callable[[str], object],
) -> Actor:
    """What samples completions of the run's prompts and rewards them; `on_progress` hears what was finished.

    Raises:
      ValueError: a reward or the rollout's function can't be loaded, or the rows lack a column that a reward asks for.
    """
    r, given = config.rollout, config.rewards
    longest = max(int(part.prompt_lengths.max()) for part in (data.train, data.held_out) if part is not None)
    completions = config.batch_size * r.steps_per_generation
    return Actor(
        cfg,
        data.tokenizer,
        rewards.load(
            given.functions,
            config_lib.plain(given.options),
            columns=data.train.column_names,
            tokenizer=data.tokenizer,
            mesh=mesh,
            timeout=given.timeout,
            workers=given.workers,
            memory_gb=given.memory_gb,
            max_error_rate=given.max_error_rate,
        ),
        limits={
            "temperature": r.temperature,
            "top_k": r.top_k,
            "top_p": r.top_p,
            "min_p": r.min_p,
            "repetition_penalty": r.repetition_penalty,
            "min_new": r.min_new_tokens,
        },
        stop=tuple(r.stop),
        max_length=config.max_length,
        max_completion_length=r.max_completion_length,
        min_completion_length=r.min_completion_length,
        slots=min(r.slots or completions, completions),
        max_prompt_tokens=longest if r.function is None else config.max_length - 1,
        function=r.function and user_code.load(r.function),
        on_progress=on_progress,
        ends=hf.stop_ids(cfg, data.tokenizer, config.model.path),
    )


class Run(Programs):
    """The pieces of one run on one mesh: its programs, data and weights; call under `jax.set_mesh(mesh)`.

    Attributes:
      data: as its name says.
      source: step -> host batch, with `ref_logps` where the reference is cached; or (step, whole weights) -> the same.
      rollouts: the source, where it samples with the policy's weights; else None.
      examples_per_step: examples of the data that a step uses up.
      begins_at_reference: the policy's first weights are the reference's.
      on_progress: called with what was finished, for a watchdog.
    """

    def __init__(self, config: ConfigDict, mesh: jax.sharding.Mesh, data: Data):
        self.config, self.data = config, data
        platform = mesh.devices.flat[0].platform
        cfg = model_config(config, path=config.model.path, platform=platform)
        check_model(cfg, config, data.train.meta["vocab_size"])
        ref_path = config.reference.path
        ref_cfg = cfg if ref_path is None else model_config(config, path=ref_path, platform=platform)
        check_model(ref_cfg, config, data.train.meta["vocab_size"])
        self.on_progress: Callable[[str], object] = lambda what: None

        self._buckets = tuple(config.data.buckets) or None
        self._packing = {"packing": config.data.packing, "packed_length": config.data.packed_length}
        self._rows_of = functools.partial(sharding.process_rows, mesh)
        layout = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "buckets": self._buckets,
            **self._packing,
            "row_multiple": sharding.axis_size(sharding.ROWS, mesh) * config.gradient_accumulation_steps,
            "rows": self._rows_of,
        }
        self.rollouts: rollout.Rollouts | None = None
        self.examples_per_step: float = config.batch_size
        source: Any
        if config_lib.kind(config) == "prompts":
            source = self.rollouts = self._rollouts(cfg, mesh, layout)
            self.examples_per_step = source.prompts_per_step
        else:
            weigh = weigher(config.data.weight, data.train)
            source = batching.ExampleSource(data.train, prefixes=config.data.prefixes, weigh=weigh, **layout)
        self.source: Callable[..., Any] = source
        self.slots_of = source.slots_of
        super().__init__(config, mesh, cfg, ref_cfg, steps=config.steps or source.steps(config.epochs))
        self.begins_at_reference = ref_path is None and self.objective.needs_reference
        if self.frozen is not None and config.tokenizer.add_tokens:
            if "embed_tokens" not in self.frozen.spec.modules_to_save:
                log.warning(
                    "tokenizer.add_tokens: embed_tokens is not in lora.modules_to_save, so the rows of new tokens stay "
                    "the mean of the others"
                )
        self._score_pairs = config.batch_size // config.gradient_accumulation_steps

    def _rollouts(self, cfg: ModelConfig, mesh: jax.sharding.Mesh, layout: Mapping[str, Any]) -> rollout.Rollouts:
        """The source of a policy that writes its own examples."""
        r, objective = self.config.rollout, objective_of(self.config, cfg)
        return rollout.Rollouts(
            self.data.train,
            make_actor(self.config, cfg, self.data, mesh, lambda what: self.on_progress(what)),
            num_generations=r.num_generations,
            steps_per_generation=r.steps_per_generation,
            num_iterations=r.num_iterations,
            resample=r.resample,
            weights=self.config.rewards.weights,
            scale=self.config.rewards.scale,
            aggregation=self.config.rewards.aggregation,
            estimator=objective.estimator,
            beta=objective.beta if objective.kl_in_reward else 0.0,
            clip_range=self.config.rewards.clip_range or None,
            normalize=self.config.rewards.normalize_advantages,
            score=self._score_rollout,
            scored=programs.scored(self.config, objective),
            sampling_logps=programs.has_sampling_logps(self.config),
            corrects=self.config.loss.importance_sampling_correction,
            mask_truncated=self.config.loss.mask_truncated_completions,
            **layout,
        )

    def _score_rollout(
        self, sampled: rollout.Rollout, params: models.Params, reference_params: models.Params | None
    ) -> dict[str, np.ndarray]:
        """Token log-probs [C, T] of a rollout under the weights that it was sampled with, and under the reference."""
        assert self.rollouts is not None
        by: dict[str, Any] = {
            "old_logps": (self.score_policy, params),
            "ref_logps": (self.score_once, reference_params),
        }
        found = {}
        for name in self.rollouts.scored:
            score, weights = by[name]
            scored = reference.score_all(
                sampled,  # type: ignore[arg-type]
                score,
                weights,
                mesh=self.mesh,
                batch_size=self._score_pairs,
                on_progress=lambda done, total: self.on_progress(f"batch {done} of {total} of a rollout's log-probs"),
                buckets=self._buckets,
                **self._packing,
            )
            found[name] = np.zeros(sampled.tokens.shape, np.float32)
            found[name][sampled.inside] = scored.logps
        return found

    @property
    def reward_names(self) -> Sequence[str]:
        """What metrics call the rewards of sampled completions; () where nothing is sampled."""
        return () if self.rollouts is None else self.rollouts.actor.rewards.names

    def close(self) -> None:
        """Ends the processes that reward completions."""
        if self.rollouts is not None:
            self.rollouts.actor.rewards.close()

    @functools.cached_property
    def _initial(self) -> models.Params:
        """The policy's first weights in float32, until `new_state` or `release` gives them up; under LoRA adapters."""
        if self.frozen is None:
            return self._model()
        if (first := self._first_adapter) is not None:
            return first
        assert self.base is not None
        init = functools.partial(lora.init, self.cfg, spec=self.frozen.spec)
        key = jax.random.key(self.config.seed)
        return jax.jit(init, out_shardings=self._shardings)(key, base=self.base.base)

    def _model(self, keep: Any = None) -> models.Params:
        """The weights at model.path, or random ones, in float32; or what `keep` makes of each."""
        if self.config.model.path is not None:
            return self._load(self.config.model.path, self.cfg, self._model_shardings, keep)
        init = jax.jit(functools.partial(models.init, self.cfg), out_shardings=self._model_shardings)
        params = init(jax.random.key(self.config.seed))
        return params if keep is None else lora.nest({path: keep(path, x) for path, x in lora.flat(params).items()})

    @functools.cached_property
    def base(self) -> lora.Frozen | None:
        """Under LoRA the frozen weights, each cast or quantised as it is read; else None."""
        if self.frozen is None:
            return None
        keep = frozen.keeper(self.cfg, self.frozen.spec, self.mesh, self.config.model.quantize)
        return lora.Frozen(self._model(keep), self.frozen.spec)

    @property
    def _first_adapter(self) -> models.Params | None:
        """The adapter that a run begins with, if it is not a new one; a new one changes nothing."""
        path = self.config.lora.path
        if self.frozen is None or path is None:
            return None
        trained_beside = peft_files.read_config(path, self.cfg).base_hash
        lora.check_base(trained_beside, self._base_identity, what=f"the adapter {path}")
        return peft_files.load(path, self.cfg, mesh=self.mesh)[1]

    def whole(self, params: models.Params) -> models.Params:
        """All weights of the model that `params`, a state's, train: themselves, or the frozen ones with adapters."""
        return lora.attach(self.base, params)

    def _load(self, path: str, cfg: ModelConfig, shardings: Any, keep: Any = None) -> models.Params:
        began = time.perf_counter()
        options = {} if keep is None else {"keep": keep}
        params = hf.load(path, cfg, dtype="float32", shardings=shardings, head=self.objective.head, **options)[1]
        log.info("read %s in %.1f s", path, time.perf_counter() - began)
        return params

    @functools.cached_property
    def reference_params(self) -> models.Params:
        """The fixed reference's weights, in the compute dtype."""
        path = self.config.reference.path
        if path is None and self.frozen is not None:
            return lora.attach(self.base, self._first_adapter)  # no copy of the frozen weights
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
        return reference.place(self.mesh, batch)

    def score_reference(self, say: Callable[[str], None]) -> None:
        """Scores what is scored once: the training rows for reference.mode=cached, and the evaluation rows."""
        if self.cached_reference:
            lookup = self._cached(self.data.train, self._score_pairs, "training", say)
            # Which global rows these are says which sequences they hold; packed ones say so themselves.
            rows = self._rows_of(self.rows) if self.config.data.packing == "off" else None
            examples = self.source

            def source(n: int, view: Any = None) -> Any:
                batch = examples(n, view)
                return {**batch, "ref_logps": lookup(batch, rows)}

            self.source = source
        if self.data.held_out is not None:
            limit = self.config.eval.max_rows
            held_out = self.data.held_out
            self.eval_data = held_out if limit is None else held_out.select(np.arange(min(limit, len(held_out))))
            if self.objective.needs_reference and self.sync is None and self.rollouts is None:
                self._eval_reference = self._cached(self.eval_data, self.eval_examples, "evaluation", say)

    def reference_file(self, prepared: sources.Prepared) -> epath.Path:
        """Where the reference's log-probs of these pairs are kept: beside the tokenized rows."""
        path = self.config.reference.path
        model = self._policy_identity if path is None else self._identity(path)
        return reference.cache_file(self.data.train.kept_in, model=model, prepared=prepared, cfg=self.ref_cfg)

    def first_completions_file(self) -> epath.Path:
        """Where the completions of the untrained policy are kept: what they depend on is in the name."""
        samples = self.config.samples
        ends = hf.stop_ids(self.cfg, path=self.config.model.path)
        asked = [samples.prompts, samples.max_new_tokens, samples.temperature, self.config.seed, ends]
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
            **self._packing,
            on_progress=tell,
        )

    @functools.cached_property
    def _policy_identity(self) -> str:
        """Of the policy as it begins."""
        if self.frozen is None:
            return self._base_identity
        adapter = self.config.lora.path and peft_files.fingerprint(self.config.lora.path)
        what = [self._base_identity, self.config.model.quantize, adapter]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @functools.cached_property
    def _base_identity(self) -> str:
        return self._identity(self.config.model.path)

    @property
    def base_hash(self) -> str | None:
        """Under LoRA what the frozen weights are known by; else None."""
        return None if self.frozen is None else self._base_identity

    def _identity(self, path: str | None) -> str:
        """Of the weights at `path`, or of the random ones."""
        if path is not None:
            return hf.fingerprint(path)
        random = {"seed": self.config.seed, "model": config_lib.plain(self.config.model.random), "jax": jax.__version__}
        return hashlib.sha256(json.dumps(random, sort_keys=True).encode()).hexdigest()

    def eval_batches(self, state: step_lib.TrainState, *, untrained: bool = False) -> Iterator[dict[str, jax.Array]]:
        """The fixed evaluation examples on the mesh, each with the same weight, with ref_logps if the loss needs them.

        To be called after `score_reference`.

        Where the policy is `untrained` and so still the reference that has scored them, its log-probs come with them.
        """
        is_known = untrained and self.begins_at_reference
        batches = batching.EvalBatches(
            self.eval_data,
            batch_size=self.eval_examples,
            buckets=self._buckets,
            **self._packing,
            row_multiple=sharding.axis_size(sharding.ROWS, self.mesh),
            rows=self._rows_of,
        )
        rows = self._rows_of(batches.n_rows)
        for n in range(len(batches)):
            self.on_progress(f"batch {n} of {len(batches)} of an evaluation")
            batch = {name: leaf for name, leaf in batches[n].items() if name != "weight"}
            if not self.objective.needs_reference:
                yield reference.place(self.mesh, batch)
            elif self.sync is None:
                logps = self._eval_reference(batch, rows)
                known = {"logps": logps} if is_known else {}
                yield reference.place(self.mesh, {**batch, "ref_logps": logps, **known})
            else:
                placed = reference.place(self.mesh, batch)
                yield {**placed, "ref_logps": self.score_once(state.aux["reference"], placed)}
