"""Adapters from and to PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.

A key of adapter_config.json is honoured, is about how the adapter came to be, or is refused by name where it says
something that would change the numbers. Nothing is imported from PEFT.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import gather, lora, models, paths, safetensors_file
from jaxalign.messages import listed
from jaxalign.models.config import ModelConfig
from jaxalign.paths import PathLike, inside, read_json, write_json
from jaxalign.safetensors_file import DTYPES, Folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_HASH = "jaxalign_base_hash"
"""Our own key of adapter_config.json: `hf.fingerprint` of the base. PEFT reads over it, with a warning."""

_PREFIX = "base_model.model."
_HONOURED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "init_lora_weights", "task_type",
}  # fmt: skip
_HISTORY = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "runtime_config",
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "lora_ga_config", BASE_HASH,
}  # fmt: skip
# Beginnings that leave the base as it is; the others (pissa, olora, corda, loftq) take a part of it away.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """What an adapter_config.json says: the adapters, and the base that they belong to as far as it is named."""

    spec: lora.Spec
    base_model_name_or_path: str | None
    base_hash: str | None


def read_config(folder: PathLike, cfg: ModelConfig) -> Adapter:
    """The adapter_config.json of a folder, here or in a bucket, for a model of `cfg`.

    Raises:
      ValueError: no LoRA adapter there; a key that changes the numbers and is not implemented; names of projections or
        modules that the model has not.
    """
    file = inside(_at(folder), CONFIG)
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type {config.get('peft_type')!r}; only LORA adapters are read")
    refused = [f"{key} = {value!r}" for key, value in config.items() if value and key not in _HONOURED | _HISTORY]
    if config.get("bias", "none") == "none":
        refused = [text for text in refused if not text.startswith("bias ")]
    if config.get("init_lora_weights") not in _BEGINNINGS:
        refused.append(f"init_lora_weights = {config['init_lora_weights']!r} (which changes the base's weights)")
    if config.get("layers_pattern") not in (None, "", "layers", [], ["layers"]):
        refused.append(f"layers_pattern = {config['layers_pattern']!r}")
    if refused:
        raise ValueError(f"{file} has {listed(refused)}, which is not implemented; merge the adapter with PEFT instead")
    named, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not named:
        raise ValueError(f"{file} has target_modules {named!r}, expected names, a regular expression or all-linear")
    if isinstance(named, str) and named.lower() == lora.ALL_LINEAR:
        named = lora.ALL_LINEAR
    whole = list(config.get("modules_to_save") or ())
    if config.get("task_type") == "SEQ_CLS":  # PEFT names both names that such a head may have
        whole = [name for name in whole if name not in ("classifier", "score")]
    if cfg.tie_word_embeddings and not cfg.num_labels:
        both = config.get("ensure_weight_tying") or {"embed_tokens", "lm_head"} <= set(whole)
        if not both and {"embed_tokens", "lm_head"} & set(whole):
            raise ValueError(
                f"{file} has modules_to_save {whole}, but the model's embed_tokens and lm_head are one table, of which "
                "PEFT trained a copy for one of its two uses; such an adapter is not read"
            )
        whole = ["embed_tokens" if name == "lm_head" else name for name in whole]
    whole = [name for entry in whole for name in _whole(cfg, entry)]
    spec = lora.Spec(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        targets=(named,) if isinstance(named, str) else tuple(sorted(named)),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        modules_to_save=tuple(dict.fromkeys(whole)),
        layers=None if layers in (None, []) else tuple([layers] if isinstance(layers, int) else layers),
        rank_pattern=tuple((config.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((config.get("alpha_pattern") or {}).items()),
    )
    lora.declare(cfg, spec)  # names that the model has not are found here
    return Adapter(spec, config.get("base_model_name_or_path"), config.get(BASE_HASH))


def load(
    folder: PathLike, cfg: ModelConfig, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[lora.Spec, models.Params]:
    """Reads an adapter: its spec, and the trainable tree in float32, placed on `mesh` where there is one.

    A layer that the config gives no adapter has zeros. With several processes each reads the file.

    Raises:
      ValueError: see `read_config`; missing, unexpected or misshapen tensors (all are listed); a damaged file.
    """
    where = _at(folder)
    spec = read_config(folder, cfg).spec
    tensors = _tensors(cfg, spec)
    found = safetensors_file.read_header(inside(where, WEIGHTS))
    optional = _tied_head(cfg, spec)
    missing = [name for name in tensors if name not in found and name not in optional]
    extra = sorted(name for name in found if name not in tensors)
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(one.shape)}"
        for name, one in tensors.items()
        if name in found and found[name].shape != one.shape
    ]
    unread = [
        f"{name} is {one.dtype}" for name, one in found.items() if one.dtype not in safetensors_file.NAMES.values()
    ]
    if missing or extra or misshapen or unread:
        raise ValueError(
            f"{where / WEIGHTS} does not hold the tensors that {CONFIG} says. Missing ({len(missing)}): "
            f"{listed(missing) or 'none'}. Unexpected ({len(extra)}): {listed(extra) or 'none'}. Misshapen "
            f"({len(misshapen)}): {listed(misshapen + unread) or 'none'}"
        )
    declared = lora.flat(lora.declare(cfg, spec))
    shardings = {} if mesh is None else lora.flat(lora.shardings(cfg, spec, mesh))
    by_leaf = itertools.groupby(
        (name for name in tensors if name in found and name not in optional), key=lambda name: tensors[name].path
    )
    leaves = {}
    for path, names in by_leaf:
        values = np.zeros(declared[path].shape, np.float32)
        for name in names:
            one = tensors[name]
            value = safetensors_file.read_rows(found[name])
            part = values if one.layer is None else values[one.layer]
            if one.transposed:
                value = value.T
            part[tuple(slice(size) for size in value.shape)] = value
        leaves[path] = jax.device_put(values, shardings.get(path))
    for name in optional & found.keys():
        table = np.asarray(leaves[tensors[name].path])
        if not np.array_equal(safetensors_file.read_rows(found[name]).astype(np.float32), table):
            raise ValueError(
                f"{where / WEIGHTS}: {name} differs from embed_tokens, to which the model's head is tied; such an "
                "adapter is not read"
            )
    return spec, lora.nest(leaves)


def rows_of(folder: PathLike, *modules: str) -> int:
    """The rows of what an adapter has whole of some modules, maybe more than its base's; 0 without these."""
    tensors = safetensors_file.read_header(inside(_at(folder), WEIGHTS))
    endings = tuple(f".{module}.weight" for module in modules)
    return max((one.shape[0] for name, one in tensors.items() if name.endswith(endings)), default=0)


def save(
    folder: PathLike,
    cfg: ModelConfig,
    spec: lora.Spec,
    adapters: models.Params,
    *,
    base_model_name_or_path: str | None,
    base_hash: str | None = None,
    dtype: str = "float32",
) -> Folder:
    """Writes an adapter that PEFT opens; all processes of a run call it, the first one writes.

    adapter_config.json comes last: a folder without it is no adapter. Where a tied embedding was trained whole, it is
    written under both names, as PEFT would otherwise give it to one of its two uses alone.

    Args:
      base_model_name_or_path: where PEFT will look for the base.
      base_hash: `hf.fingerprint` of the base, by which `lora.check_base` knows it again.

    Returns:
      The folder.

    Raises:
      ValueError: adapters that are not those of `spec`; a folder that holds something else; a copy that reads back
        otherwise.
    """
    lora.check(models.declare(cfg), spec, adapters)
    where = paths.at(folder)
    paths.check_bucket(where)
    if where.exists() and not (where / CONFIG).exists() and any(file.name != WEIGHTS for file in where.iterdir()):
        raise ValueError(f"{where} exists and is no adapter's folder; choose another folder or remove it")
    tensors = _tensors(cfg, spec)
    first = jax.process_index() == 0
    leaves = lora.flat(adapters)
    blocks = gather.stream(
        lambda path: leaves[path],
        # Whole, with the ranks that other layers have: they are cut off below.
        {name: one._replace(shape=_stored_shape(leaves[one.path], one)) for name, one in tensors.items()},
        [list(tensors), *[[] for _ in range(jax.process_count() - 1)]],
        DTYPES[dtype],
    )
    if first:
        paths.make_folder(where)
        (where / CONFIG).unlink(missing_ok=True)
        shard = safetensors_file.Shard(WEIGHTS, {name: one.shape for name, one in tensors.items()})
        sums = safetensors_file.write(where, shard, DTYPES[dtype], _cut(blocks, tensors))
        safetensors_file.verify(where, shard, DTYPES[dtype], sums)
        write_json(where / CONFIG, _config(cfg, spec, base_model_name_or_path, base_hash))
    else:
        for _ in blocks:
            raise AssertionError("only the first process has tensors to write")
    gather.wait_for_all("adapter written")
    return where


def fingerprint(folder: PathLike) -> str:
    """A hexadecimal digest of an adapter's config and weights, whatever its path."""
    hashes = [paths.content_hash(inside(_at(folder), name)) for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _at(folder: PathLike) -> Folder:
    where = paths.at(folder)
    if str(folder).startswith("hf://") or not where.exists():
        raise ValueError(f"adapter {str(folder)!r}: expected a folder with {CONFIG} and {WEIGHTS}, here or in a bucket")
    return where


def _tensors(cfg: ModelConfig, spec: lora.Spec) -> dict[str, gather.Tensor]:
    """The tensors of an adapter's file by their names, leaf after leaf."""
    declared = models.declare(cfg)
    tensors = {}
    for target in lora.targets(declared, spec):
        names = lora.module_names(target.path, len(target.ranks))
        _, n_in, n_out = lora.flat(declared)[*target.path, "kernel"].shape
        for leaf, stem in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, (name, rank) in enumerate(zip(names, target.ranks, strict=True)):
                shape = (rank, n_in) if leaf == "lora_a" else (n_out, rank)
                if rank:
                    path = (*target.path, leaf)
                    tensors[f"{_PREFIX}{name}.{stem}.weight"] = gather.Tensor(path, layer, True, shape)
    whole = lora.saved(declared, spec)
    for path, weight in lora.flat(declared).items():
        if path[:-1] in whole:
            stacked, transposed = path[0] == "layers", path[-1] == "kernel"
            shape = weight.shape[1:] if stacked else weight.shape
            kind = "bias" if path[-1] == "bias" else "weight"
            for layer, name in enumerate(lora.module_names(path[:-1], weight.shape[0])):
                tensors[f"{_PREFIX}{name}.{kind}"] = gather.Tensor(
                    path, layer if stacked else None, transposed, shape[::-1] if transposed else shape
                )
    for name in _tied_head(cfg, spec):
        tensors[name] = tensors[f"{_PREFIX}model.embed_tokens.weight"]
    return tensors


def _tied_head(cfg: ModelConfig, spec: lora.Spec) -> set[str]:
    """The name of the head where it is the embedding that was trained."""
    tied = cfg.tie_word_embeddings and not cfg.num_labels and "embed_tokens" in spec.modules_to_save
    return {f"{_PREFIX}lm_head.weight"} if tied else set()


def _whole(cfg: ModelConfig, entry: str) -> list[str]:
    """The modules that an entry of modules_to_save names in PEFT: all whose names end so, even within a word."""
    declared = models.declare(cfg)
    found = [
        path[-1]
        for path in lora.modules(declared)
        if all(name.endswith(entry) for name in lora.module_names(path, cfg.num_hidden_layers))
    ]
    return found or [entry]  # lora.saved refuses what there is not


def _stored_shape(leaf: Any, tensor: gather.Tensor) -> tuple[int, ...]:
    shape = tuple(leaf.shape if tensor.layer is None else leaf.shape[1:])
    return shape[::-1] if tensor.transposed else shape


def _cut(
    blocks: Iterator[tuple[str, np.ndarray]], tensors: Mapping[str, gather.Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor whole, without what stands beyond its own rank."""
    for name, parts in itertools.groupby(blocks, key=lambda block: block[0]):
        value = np.concatenate([rows.copy() for _, rows in parts])
        yield name, np.ascontiguousarray(value[tuple(slice(size) for size in tensors[name].shape)])


def _config(cfg: ModelConfig, spec: lora.Spec, base: str | None, base_hash: str | None) -> dict[str, Any]:
    """The adapter_config.json. Where not every layer is alike, projections are named one by one."""
    found = lora.targets(models.declare(cfg), spec)
    named = {target.path[-1] for target in found}
    ranks, alphas = {}, {}
    for target in found:
        for name, rank, scale in zip(
            lora.module_names(target.path, len(target.ranks)), target.ranks, target.scales, strict=True
        ):
            if rank:
                ranks[name] = rank
                alphas[name] = scale * (rank**0.5 if spec.rslora else rank)
    everywhere = all(all(target.ranks) for target in found)
    whole = [*spec.modules_to_save, *(["lm_head"] if _tied_head(cfg, spec) else [])]
    whole = ["model.norm" if name == "norm" else name for name in whole]  # "norm" would be every norm (see _whole)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if cfg.num_labels else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": sorted(named if everywhere else ranks),
        "modules_to_save": (whole + ["score"] * bool(cfg.num_labels)) or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != spec.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if abs(alpha - spec.alpha) > 1e-9 * spec.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **({} if base_hash is None else {BASE_HASH: base_hash}),
    }
