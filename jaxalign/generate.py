"""Completions of prompts, or a chat: `python -m jaxalign.generate --model=PATH --prompt="Why is the sky blue?"`.

    --model=PATH          Hugging Face folder, .gguf file, hub id, package:NAME, or the folder of a run (with --step)
    --adapter=FOLDER      PEFT adapters that are merged into --model
    --prompt=TEXT         one prompt; --prompts=FILE.jsonl takes rows {"prompt": text or chat messages}; neither: a chat
    --out=FILE.jsonl      the rows again, each with its completion

`complete` does the same from Python. See `--help` for the other flags.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from jaxalign import hf, lora, models, paths, peft_files, sampling, sharding
from jaxalign.data import chat
from jaxalign.models import ModelConfig, Params

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
"""Text, chat messages, or token ids that stand as they are."""

PROMPT_MULTIPLE = 32  # lengths of prompts are padded to buckets of this


class Completion(NamedTuple):
    """One completion: its text without special tokens, its token ids, and whether it ended by itself (a stop id)."""

    text: str
    tokens: list[int]
    finished: bool


def complete(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    raw: bool = False,
) -> list[str]:
    """The text of one completion of each prompt; see `stream`."""
    completions = stream(
        cfg,
        params,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_ids=stop_ids,
        batch_size=batch_size,
        raw=raw,
    )
    return [completion.text for completion in completions]


def stream(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    raw: bool = False,
) -> Iterator[Completion]:
    """One completion of each prompt, in order, a batch at a time.

    Args:
      params: as `models.apply` takes them; on a mesh, call this under `sharding.use_mesh`, in every process alike.
      prompts: text is one user turn of a chat (where the tokenizer has a chat template), messages go through the
        template, token ids stand as they are. A prompt given several times is sampled anew each time.
      max_new_tokens: of each completion; fewer where the model's context ends before.
      temperature: 0 is greedy.
      seed: with it the completion of prompt i is fixed, whatever the other prompts are.
      stop_ids: None: the model's own (`hf.stop_ids`).
      batch_size: prompts that are decoded at once.
      raw: text stands as it is, as the beginning of a document.

    Raises:
      ValueError: a prompt without tokens or without room for an answer, messages without a chat template, a number that
        makes no sense. Raised before anything is compiled.
    """
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, expected a finite number of at least 0 (0 is greedy)")
    encoded = [_encode(cfg, tokenizer, prompt, number, raw) for number, prompt in enumerate(prompts)]
    stops = tuple(hf.stop_ids(cfg, tokenizer) if stop_ids is None else stop_ids)
    # Every batch has the same rows, so that it has the same program; fillers ask for no tokens.
    rows = max(min(batch_size, len(encoded)), 1)
    rows = -(-rows // sharding.axis_size(sharding.ROWS)) * sharding.axis_size(sharding.ROWS)
    for start in range(0, len(encoded), rows):
        batch = encoded[start : start + rows]
        fillers = rows - len(batch)
        prompts_BP, mask_BP = sampling.left_pad(batch + [[]] * fillers, cfg.pad_token_id or 0, PROMPT_MULTIPLE)
        room = [min(max_new_tokens, cfg.max_position_embeddings - len(ids)) for ids in batch]
        samples = sampling.generate(
            cfg,
            params,
            prompts_BP,
            mask_BP,
            sampling.request_keys(seed, range(start, start + rows)),
            sampling.make_limits(rows, temperature=temperature, max_new=room + [0] * fillers, stop_ids=stops),
            max_new_tokens=max_new_tokens,
        )
        tokens_BN, mask_BN = np.asarray(samples.tokens), np.asarray(samples.mask)
        for row in range(len(batch)):
            tokens = tokens_BN[row, mask_BN[row]].tolist()
            yield Completion(tokenizer.decode(tokens, skip_special_tokens=True), tokens, tokens[-1] in stops)


def _encode(cfg: ModelConfig, tokenizer: Any, prompt: Prompt, number: int, raw: bool) -> list[int]:
    try:
        if isinstance(prompt, str):
            as_chat = not raw and chat.template_of(tokenizer) is not None
            turns = [{"role": "user", "content": prompt}]
            ids = chat.encode_prompt(tokenizer, turns if as_chat else prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            if raw:
                raise ValueError("chat messages need the chat template; give text, or leave raw off")
            ids = chat.encode_prompt(tokenizer, [dict(message) for message in prompt])  # type: ignore[arg-type]
        else:
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from error
    if not ids:
        raise ValueError(f"prompt {number} has no tokens; there is nothing to continue")
    if len(ids) >= cfg.max_position_embeddings:
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens, the model's context is {cfg.max_position_embeddings}; shorten it, "
            "so that an answer fits"
        )
    return ids


# The command


class Model(NamedTuple):
    """What answers: config, weights, tokenizer, and the ids that end an answer."""

    cfg: ModelConfig
    params: Params
    tokenizer: Any
    stop_ids: tuple[int, ...]


def load(
    path: str,
    step: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    head: str = "lm",
    adapter: str | None = None,
) -> Model:
    """A model from wherever `path` says; weights and computations in bfloat16 on accelerators, float32 on CPU.

    Args:
      path: see `hf.resolve`; or the folder of a run (it holds checkpoints/ or export/), in its own precision.
      step: of a run: "last" (also None), "best" or a number.
      mesh: where the weights go; None is one device.
      head: see `hf.load`; a run has its own.
      adapter: a PEFT folder whose adapters are merged into the weights; its tokenizer, if it has one, is taken.

    Raises:
      ValueError: no model there, a step of what is no run, or weights that don't divide over the mesh.
    """
    folder = paths.at(path)
    checkpoints, exported = folder / "checkpoints", folder / "export"
    if adapter is not None and (checkpoints.is_dir() or exported.is_dir()):
        raise ValueError(f"--adapter={adapter} goes with the model that it was trained beside, and {path!r} is a run")
    if checkpoints.is_dir() or (exported.is_dir() and step not in (None, "last")):
        from jaxalign import export

        cfg, params, tokenizer = export.load_run(folder, step or "last")
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        return Model(cfg, params, tokenizer, hf.stop_ids(cfg, tokenizer))
    if exported.is_dir():
        path = str(exported)
    elif step is not None:
        raise ValueError(f"--step={step} is for the folder of a run; {path!r} holds neither checkpoints/ nor export/")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = dataclasses.replace(hf.read_config(path), compute_dtype=dtype)
    if adapter is not None and head == "score":
        cfg = dataclasses.replace(cfg, num_labels=peft_files.rows_of(adapter, "score") or cfg.num_labels)
    if head == "score" and not cfg.num_labels:
        raise ValueError(f"{path} is a language model; a reward model (...ForSequenceClassification) is expected here")
    has_tokenizer = adapter is not None and (paths.at(adapter) / "tokenizer_config.json").exists()
    tokenizer = hf.load_tokenizer(adapter if adapter is not None and has_tokenizer else path)
    if adapter is not None:
        rows = peft_files.rows_of(adapter, "embed_tokens", "lm_head") or max(tokenizer.get_vocab().values()) + 1
        cfg = dataclasses.replace(cfg, vocab_size=max(cfg.vocab_size, rows))
    shardings = None if mesh is None else sharding.param_shardings(mesh, models.declare(cfg))
    cfg, params = hf.load(path, cfg, dtype=dtype, shardings=shardings, head=head)
    if adapter is not None:
        lora.check_base(peft_files.read_config(adapter, cfg).base_hash, hf.fingerprint(path), what=adapter)
        spec, adapters = peft_files.load(adapter, cfg, mesh=mesh)
        params = lora.merge(params, adapters, spec)
    return Model(cfg, params, tokenizer, hf.stop_ids(cfg, tokenizer, path))


def define_flags(values: flags.FlagValues) -> None:
    """The command's flags."""
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
    text("model", None, "Hugging Face folder, .gguf file, hub id, package:NAME, or the folder of a run.", values)
    text("step", None, "Of a run: last (the default), best, or a step's number.", values)
    text("adapter", None, "PEFT folder with adapters for --model.", values)
    text("prompt", None, "One prompt.", values)
    text("prompts", None, 'File with rows {"prompt": text or chat messages} (jsonl, json, parquet, csv).', values)
    text("out", None, "File for one JSON line a completion: the row, completion, sample, tokens, finished.", values)
    text("system", None, "System message put before prompts that have none.", values)
    switch("raw", False, "Prompts are the beginning of a text: no chat template.", values)
    switch("help", False, "Print the flags and stop.", values)
    number("max_new_tokens", 256, "Tokens of a completion at most.", 1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0: greedy.", 0.0, flag_values=values)
    number("seed", 0, "Seed of sampling.", 0, flag_values=values)
    number("n", 1, "Completions of each prompt.", 1, flag_values=values)
    number("batch_size", 8, "Prompts decoded at once.", 1, flag_values=values)
    number("tensor", 1, "Devices that the model is split over.", 1, flag_values=values)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; mistakes are printed to stderr and end it with status 2."""
    values = flags.FlagValues()
    define_flags(values)
    try:
        if rest := values(list(sys.argv if argv is None else argv))[1:]:
            raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return
        rows = _rows(values)
        began = time.monotonic()
        mesh = None
        if values.tensor > 1:
            mesh = sharding.make_mesh(tensor=values.tensor, devices=jax.devices()[: values.tensor])
        model = load(values.model, values.step, mesh, adapter=values.adapter)
        _say(f"{values.model} loaded in {time.monotonic() - began:.1f} s")
        with sharding.use_mesh(mesh):
            if rows:
                _answer_all(model, rows, values)
            else:
                _chat(model, values)
    except (flags.Error, ValueError) as error:
        _say(f"generate: {error}")
        raise SystemExit(2) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rows(values: flags.FlagValues) -> list[dict[str, Any]]:
    """The rows to answer, each with a `prompt`; none means a chat. Contradictory flags raise ValueError."""
    if values.model is None:
        raise ValueError("--model is missing: a Hugging Face folder, .gguf file, hub id, package:NAME or run folder")
    if values.prompt is not None and values.prompts is not None:
        raise ValueError("--prompt and --prompts were both given; give one of them, or neither for a chat")
    if values.raw and values.system is not None:
        raise ValueError("--system needs the chat template, which --raw leaves out; drop one of them")
    if values.n > 1 and values.temperature == 0:
        raise ValueError(f"--n={values.n} greedy completions are all equal; set --temperature above 0")
    if values.out is not None and not Path(values.out).expanduser().absolute().parent.is_dir():
        raise ValueError(f"--out={values.out}: its folder does not exist")
    if values.prompt is not None:
        return [{"prompt": values.prompt}]
    if values.prompts is None:
        if not sys.stdin.isatty():
            raise ValueError("nothing to answer: give --prompt=TEXT or --prompts=FILE.jsonl; a chat needs a terminal")
        if values.out is not None or values.n > 1:
            raise ValueError("--out and --n are for --prompt and --prompts; a chat shows one answer at a time")
        return []
    from jaxalign.data import sources

    rows = list(sources.read_rows(values.prompts))
    for number, row in enumerate(rows):
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        is_chat = isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt)
        if not isinstance(prompt, str) and not is_chat:
            shown = f"{row!r:.200}"
            raise ValueError(f'{values.prompts}, row {number}: expected {{"prompt": text or messages}}, got {shown}')
    if not rows:
        raise ValueError(f"{values.prompts} holds no rows")
    return rows


def _with_system(prompt: str | list[Any], system: str | None) -> str | list[Any]:
    """The prompt with the system message in front, unless it has its own."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages and messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _stream(model: Model, prompts: Sequence[Prompt], values: flags.FlagValues, seed: int) -> Iterator[Completion]:
    return stream(
        model.cfg,
        model.params,
        model.tokenizer,
        prompts,
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        seed=seed,
        stop_ids=model.stop_ids,
        batch_size=values.batch_size,
        raw=values.raw,
    )


def _answer_all(model: Model, rows: list[dict[str, Any]], values: flags.FlagValues) -> None:
    """Prints the completions (alone, if there is one; else under a heading each) and writes them to --out."""
    prompts = [_with_system(row["prompt"], values.system) for row in rows for _ in range(values.n)]
    began, n_tokens = time.monotonic(), 0
    out = None if values.out is None else open(Path(values.out).expanduser(), "w", encoding="utf-8")
    try:
        for number, completion in enumerate(_stream(model, prompts, values, values.seed)):
            row, sample = rows[number // values.n], number % values.n
            n_tokens += len(completion.tokens)
            if len(prompts) > 1:
                print(f"--- prompt {number // values.n}" + (f", sample {sample}" if values.n > 1 else ""))
            print(completion.text, flush=True)
            if out is not None:
                answer = {
                    "completion": completion.text,
                    "sample": sample,
                    "tokens": len(completion.tokens),
                    "finished": completion.finished,
                }
                out.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
                out.flush()
    finally:
        if out is not None:
            out.close()
    seconds = time.monotonic() - began
    _say(f"{len(prompts)} completions, {n_tokens} tokens in {seconds:.1f} s with compilation")


def _chat(model: Model, values: flags.FlagValues) -> None:
    """A conversation on the terminal until its input ends (with --raw: one text after the other)."""
    if not values.raw and chat.template_of(model.tokenizer) is None:
        raise ValueError("the model has no chat template; use --raw to continue texts instead")
    _say("Write a message; /new begins a new conversation, /exit or Ctrl-D ends.")
    history: list[dict[str, str]] = []
    turn = 0
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/new":
            history = []
        elif text:
            turn += 1
            asked = [*history, {"role": "user", "content": text}]
            try:
                prompt = text if values.raw else _with_system(asked, values.system)
                (completion,) = _stream(model, [prompt], values, values.seed + turn)
            except ValueError as error:
                _say(f"{error}; /new begins a new conversation")
                continue
            print(completion.text)
            history = [*asked, {"role": "assistant", "content": completion.text}]


if __name__ == "__main__":
    main()
