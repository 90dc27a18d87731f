"""The small files of a model, from and to the formats of Hugging Face: config, tokenizer, generation config.

Nothing here runs code from a model folder, or touches the network unless a hub id is given. Transformers and tokenizers
are imported where they are used.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign import gguf_file, paths, safetensors_file
from jaxalign.data.templates import MARKS, TEMPLATES
from jaxalign.data.tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer, change
from jaxalign.messages import did_you_mean, first_line
from jaxalign.models.config import ModelConfig, config_from_hf, token_ids
from jaxalign.paths import PathLike, inside, read_json, write_json
from jaxalign.safetensors_file import Folder

log = logging.getLogger(__name__)

BYTES = "bytes"  # names the built-in tokenizer where a path is expected
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)


def resolve(path: PathLike) -> Folder:
    """The folder or .gguf file that `path` names; a hub model comes into the local cache first, or is read in place.

    Args:
      path: a folder with config.json, here or in a bucket (gs://); a .gguf file, or a folder holding just one;
        `package:NAME[/FILE]`, a file inside an installed Python package, found without importing it (no FILE: the one
        .gguf in it); or a hub id `organisation/name`, of which only safetensors, JSON and tokenizer files are taken.
        One process downloads them. Several read the safetensors in place, unless they are in the cache already: a pod
        reads what its hosts hold, and no disk has to hold the model. `hf://organisation/name[@revision]` is always
        read in place.

    Raises:
      ValueError: nothing there; or the hub refuses, does not know the id, or can't be reached.
    """
    return paths.find_model(path, check=read_config, in_place=_several_read_it)


def _several_read_it(folder: Path) -> bool:
    """Whether there are several processes, and the weights are not in the cache's `folder`."""
    if jax.process_count() == 1:
        return False
    try:
        safetensors_file.weight_files(folder)
    except ValueError:
        return True
    return False


def _resolve_small(path: PathLike) -> Folder:
    """As `resolve`, but of a hub model only the small files are downloaded."""
    return paths.find_model(path, check=read_config, weights=False)


def read_config(path: PathLike) -> ModelConfig:
    """The model's config, from config.json or GGUF metadata; no weights are read, nor those of a hub model fetched.

    Raises:
      ValueError: nothing there, or a model that is not implemented (see `config_from_hf`).
    """
    where = _resolve_small(path)
    if is_gguf(where):
        return gguf_file.read_config(gguf_file.open_file(where))
    file = inside(where, "config.json")
    if not file.exists():
        raise ValueError(f"{where} has no config.json; expected a Hugging Face model folder or a .gguf file")
    try:
        return config_from_hf(read_json(file))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def is_gguf(where: Folder) -> bool:
    """Whether what `resolve` found is a GGUF file; else it is a folder."""
    return not paths.is_remote(where) and where.is_file()


@contextlib.contextmanager
def _here(where: Folder) -> Iterator[Folder]:
    """A model folder with its small files on disk; of one in a bucket they are fetched, as transformers reads none."""
    if not paths.is_remote(where):
        yield where
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            if (where / name).exists():
                (Path(folder) / name).write_bytes((where / name).read_bytes())
        yield Path(folder)


def load_tokenizer(
    path: PathLike,
    *,
    chat_template: str | None = None,
    special_tokens: Mapping[str, str | Sequence[str]] | None = None,
    add_tokens: Sequence[str] = (),
) -> Any:
    """The model's tokenizer, as a transformers fast tokenizer. Code from the folder is never run.

    Args:
      path: see `resolve`; a GGUF's tokenizer is built from its metadata. "bytes" is `tokenizers.byte_tokenizer`.
      chat_template: in place of the model's own: see `read_template`.
      special_tokens, add_tokens: see `tokenizers.change`.

    Raises:
      ValueError: no tokenizer there, or one that can't be read without running code from the folder; or no such
        template or special token.
    """
    template = None if chat_template is None else read_template(chat_template)
    # transformers would advise, when first imported, to install torch, which jaxalign never needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if path == BYTES:
        tokenizer: Any = byte_tokenizer()
    elif is_gguf(where := _resolve_small(path)):
        tokenizer = gguf_file.load_tokenizer(gguf_file.open_file(where))
    else:
        with _here(where) as folder:
            tokenizer = _load_tokenizer(folder, where)
    change(tokenizer, chat_template=template, special_tokens=special_tokens, add_tokens=add_tokens)
    split = [mark for mark in MARKS.get(chat_template or "", ()) if mark not in tokenizer.get_vocab()]
    if split:
        log.warning(
            "the chat template %s writes %s, which the tokenizer splits into pieces: set tokenizer.special_tokens (its "
            "eos_token ends an answer) or tokenizer.add_tokens",
            chat_template,
            ", ".join(split),
        )
    return tokenizer


def read_template(chat_template: str) -> str:
    """A Jinja template from itself, from the file that holds it, or from its name in `templates.TEMPLATES`.

    Raises:
      ValueError: neither of the three.
    """
    if "{" in chat_template:
        return chat_template
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    if not paths.at(chat_template).is_file():
        known = ", ".join(TEMPLATES) + did_you_mean(chat_template, TEMPLATES)
        raise ValueError(f"chat template {chat_template!r} is neither Jinja text, nor a file, nor one of {known}")
    return paths.at(chat_template).read_text()


def tokenizer_identity(
    path: PathLike,
    *,
    chat_template: str | None = None,
    special_tokens: Mapping[str, str | Sequence[str]] | None = None,
    add_tokens: Sequence[str] = (),
) -> str:
    """A hash of all that `load_tokenizer` reads for the same arguments, without reading a tokenizer from it.

    Raises:
      ValueError: no tokenizer or no template there.
    """
    if path == BYTES:
        parts = [BYTES, *SPECIAL_TOKENS, CHAT_TEMPLATE]
    elif is_gguf(where := _resolve_small(path)):
        parts = [paths.content_hash(where)]
    else:
        files = [(name, where / name) for name in ("config.json", *_tokenizer_files(where))]
        parts = [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in files if file.exists()]
    template = "" if chat_template is None else read_template(chat_template)
    what = [parts, template, dict(special_tokens or {}), list(add_tokens)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def fit_to_tokenizer(
    cfg: ModelConfig,
    tokenizer: Any,
    *,
    special_tokens: Mapping[str, str | Sequence[str]] | None = None,
    add_tokens: Sequence[str] = (),
) -> ModelConfig:
    """The config of a model whose tokenizer was changed so (`load_tokenizer`): its vocabulary and its special ids.

    A model with rows to spare (vocab_size above the tokenizer's) uses them. Otherwise the vocabulary grows, by more
    than was added where the old size is a multiple of a power of two up to 128: it stays one, so that the embedding
    still divides over a mesh. `hf.load` fills the new rows.

    Raises:
      ValueError: the tokenizer has more new tokens than were added, so it is that of another model.
    """
    ids = {kind: tokenizer.convert_tokens_to_ids(token) for kind, token in (special_tokens or {}).items()}
    own: dict[str, Any] = {f"{kind}_id": ids[kind] for kind in ("bos_token", "pad_token") if kind in ids}
    if "eos_token" in ids:
        own["eos_token_id"] = (ids["eos_token"],)
    size = max(tokenizer.get_vocab().values()) + 1
    if size > cfg.vocab_size:
        added = sum(1 if isinstance(token, str) else len(token) for token in (special_tokens or {}).values())
        if size - cfg.vocab_size > added + len(add_tokens):
            raise ValueError(
                f"the tokenizer has {size} tokens and the model only {cfg.vocab_size}, which {added + len(add_tokens)} "
                "added tokens don't explain: tokenizer.path belongs to another model"
            )
        multiple = math.gcd(cfg.vocab_size, 128)
        own["vocab_size"] = -(-size // multiple) * multiple
    return dataclasses.replace(cfg, **own)


def _tokenizer_files(folder: Folder) -> list[str]:
    """The names of a folder's tokenizer files; ValueError if there are none, or if one leaves the folder."""
    found = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not found:
        raise ValueError(f"{folder} holds no tokenizer; expected tokenizer.json and tokenizer_config.json")
    for name in found:
        inside(folder, name)
    return found


def _load_tokenizer(folder: Folder, where: Folder) -> Any:
    """The tokenizer of the files in `folder`, which are those of `where`."""
    _tokenizer_files(where)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{where}: the tokenizer can't be read: {first_line(error)}") from error


def write_tokenizer(folder: Path, tokenizer_from: Any) -> None:
    """Writes the tokenizer files of a model (see `resolve`), or those of a transformers tokenizer, to a local folder.

    Raises:
      ValueError: the model has none.
    """
    if isinstance(tokenizer_from, str | os.PathLike):
        where = _resolve_small(tokenizer_from)
        if not is_gguf(where):
            names = [name for name in TOKENIZER_FILES if (where / name).exists()]
            if not names:
                raise ValueError(f"{where} holds no tokenizer to export; expected tokenizer.json")
            for name in names:
                (folder / name).write_bytes(inside(where, name).read_bytes())
            return
        tokenizer_from = load_tokenizer(where)
    tokenizer_from.save_pretrained(str(folder))
    # transformers 4 knows this class under its older name only, and 5 still takes that.
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def padding_of_score(cfg: ModelConfig, tokenizer: Any) -> int | None:
    """The pad token of a model with a score head, whose score transformers reads at the last token that is no pad.

    So no sequence may end with it. Where the pad token is one that ends sequences (or none is set), it is the unknown
    or beginning token or the last other special token; None if there is no other: then it scores one row at a time.
    """
    ends = {*cfg.eos_token_id, tokenizer.eos_token_id, end_of_turn(tokenizer)}
    special = [index for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    found = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special[::-1])
    return next((one for one in found if one is not None and one not in ends), None)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an answer (<|im_end|>, <|eot_id|>, </s>), or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    import jinja2

    answer = "jaxalign-answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError):  # a template may refuse such turns; then it names no end
        return None
    _, found, rest = text.rpartition(answer)
    if not found:
        return None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer.encode(rest, add_special_tokens=False)
    return next((index for index in ids if index in special and index != tokenizer.bos_token_id), None)


def stop_ids(cfg: ModelConfig, tokenizer: Any = None, path: PathLike | None = None) -> tuple[int, ...]:
    """The ids that end a generation: those of the config, of generation_config.json at `path`, and of the tokenizer.

    The tokenizer gives its end of sequence and the token with which its chat template ends an answer.
    """
    ids = list(cfg.eos_token_id)
    if path is not None:
        ids += token_ids(_source_generation_config(path).get("eos_token_id"), "eos_token_id")
    if tokenizer is not None:
        ids += [one for one in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if one is not None]
    return tuple(dict.fromkeys(ids))


def _source_generation_config(path: PathLike) -> dict[str, Any]:
    where = _resolve_small(path)
    if is_gguf(where) or not (where / "generation_config.json").exists():
        return {}
    return read_json(inside(where, "generation_config.json"))


def generation_config(cfg: ModelConfig, tokenizer: Any, source: PathLike | None) -> dict[str, Any]:
    """What generation_config.json says: that of `source` continued, with the ids that end a generation (`stop_ids`)."""
    ignored = {"transformers_version", "_from_model_config", "auto_map"}
    kept = {} if source is None else _source_generation_config(source)
    stops = list(stop_ids(cfg, tokenizer, source))
    pad = cfg.pad_token_id
    if pad is None:
        pad = getattr(tokenizer, "pad_token_id", None)
    own = dict(
        bos_token_id=cfg.bos_token_id,
        eos_token_id=(stops[0] if len(stops) == 1 else stops) if stops else None,
        pad_token_id=pad,
    )
    return {key: value for key, value in kept.items() if key not in ignored} | own
