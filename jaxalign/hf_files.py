"""The small files of a model, from and to the formats of Hugging Face: config, tokenizer, generation config.

Nothing here runs code from a model folder, or touches the network unless a hub id is given. Transformers and tokenizers
are imported where they are used.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxalign import gguf_file, paths, safetensors_file
from jaxalign.messages import first_line
from jaxalign.models.config import ModelConfig, config_from_hf, token_ids
from jaxalign.paths import PathLike, inside, read_json, write_json
from jaxalign.safetensors_file import Folder

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


def load_tokenizer(path: PathLike, *, chat_template: str | None = None) -> Any:
    """The model's tokenizer, as a transformers fast tokenizer. Code from the folder is never run.

    Args:
      path: see `resolve`; a GGUF's tokenizer is built from its metadata.
      chat_template: a Jinja template, or a file that holds one, in place of the model's own.

    Raises:
      ValueError: no tokenizer there, or one that can't be read without running code from the folder.
    """
    where = _resolve_small(path)
    given = None if chat_template is None else read_template(chat_template)
    # transformers would advise, when first imported, to install torch, which jaxalign never needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if is_gguf(where):
        tokenizer = gguf_file.load_tokenizer(gguf_file.open_file(where))
    else:
        with _here(where) as folder:
            tokenizer = _load_tokenizer(folder, where)
    if given is not None:
        tokenizer.chat_template = given
    return tokenizer


def read_template(chat_template: str) -> str:
    """A Jinja template from itself, or from the file that holds it."""
    is_file = "{" not in chat_template and paths.at(chat_template).is_file()
    return paths.at(chat_template).read_text() if is_file else chat_template


def tokenizer_identity(path: PathLike, *, chat_template: str | None = None) -> str:
    """A hash of all files that `load_tokenizer` reads for the same arguments, without reading a tokenizer from them.

    Raises:
      ValueError: no tokenizer there.
    """
    where = _resolve_small(path)
    if is_gguf(where):
        parts = [paths.content_hash(where)]
    else:
        files = [(name, where / name) for name in ("config.json", *_tokenizer_files(where))]
        parts = [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in files if file.exists()]
    given = "" if chat_template is None else read_template(chat_template)
    return hashlib.sha256(json.dumps([*parts, given]).encode()).hexdigest()


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
