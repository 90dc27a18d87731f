"""Completions of prompts, or a chat: `python -m jaxalign.generate --model=PATH --prompt="Why is the sky blue?"`.

    --model=PATH          Hugging Face folder, .gguf file, hub id, package:NAME, or the folder of a run (with --step)
    --adapter=FOLDER      PEFT adapters that are merged into --model
    --prompt=TEXT         one prompt; --prompts=FILE.jsonl takes rows {"prompt": text or chat messages}; neither: a chat
    --out=FILE.jsonl      the rows again, each with its completion

`complete` does the same from Python. See `--help` for the other flags.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from jaxalign import decoding, hf, lora, models, paths, peft_files, sampling, sharding
from jaxalign.completions import Completion, Prompt, complete, length_bounds, stream
from jaxalign.data import chat
from jaxalign.data.rows import to_json
from jaxalign.models import ModelConfig, Params

__all__ = ["Completion", "Model", "Prompt", "complete", "load", "stream"]

DISTRIBUTION = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CHAT_ROOM = 512  # tokens of a conversation before a longer one compiles anew
PROGRESS_SECONDS = 5  # of a batch, between two lines about it


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
    share, several = flags.DEFINE_float, flags.DEFINE_multi_string
    text("model", None, "Hugging Face folder, .gguf file, hub id, package:NAME, or the folder of a run.", values)
    text("step", None, "Of a run: last (the default), best, or a step's number.", values)
    text("adapter", None, "PEFT folder with adapters for --model.", values)
    text("prompt", None, "One prompt.", values)
    text("prompts", None, 'File with rows {"prompt": text or chat messages} (jsonl, json, parquet, csv).', values)
    text("out", None, "File for one JSON line a completion: the row, completion, sample, tokens, finished.", values)
    text("system", None, "System message put before prompts that have none.", values)
    switch("raw", False, "Prompts are the beginning of a text: no chat template.", values)
    switch("help", False, "Print the flags and stop.", values)
    flags.DEFINE_list(
        "max_new_tokens", ["256"], "Tokens of a completion at most; two numbers, 32,256: each draws its own.", values
    )
    number("min_new_tokens", 0, "Tokens before which no completion ends.", 0, flag_values=values)
    share("temperature", 0.0, "0: greedy.", 0.0, flag_values=values)
    number("top_k", 0, "Sample from the k likeliest tokens; 0: all.", 0, flag_values=values)
    share("top_p", 1.0, "Sample from the likeliest tokens that have this probability together.", 0.0, 1.0, values)
    share("min_p", 0.0, "Sample from tokens with this share of the likeliest one's probability.", 0.0, 1.0, values)
    share("repetition_penalty", 1.0, "Above 1: tokens that stand already are less likely.", 0.0, flag_values=values)
    several("stop", [], "Text that ends a completion, and is not part of it; may be given several times.", values)
    flags.DEFINE_list("stop_ids", None, "Token ids that end a completion, in place of the model's own.", values)
    several("bad_words", [], "Text of a token that is never sampled; may be given several times.", values)
    number("seed", 0, "Seed of sampling.", 0, flag_values=values)
    number("n", 1, "Completions of each prompt.", 1, flag_values=values)
    number("batch_size", 8, "Completions sampled at once.", 1, flag_values=values)
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
        if argv is None:  # the command itself: programs are kept for the next one
            from jaxalign import train

            train.use_compilation_cache("auto")
        began = time.monotonic()
        mesh = None
        if values.tensor > 1:
            mesh = sharding.make_mesh(tensor=values.tensor, devices=jax.devices()[: values.tensor])
        model = load(values.model, values.step, mesh, adapter=values.adapter)
        _say(f"{values.model} loaded in {time.monotonic() - began:.1f} s")
        with sharding.use_mesh(mesh):
            model = model._replace(params=decoding.view(model.cfg, model.params))  # once, and the weights stand once
            if rows:
                _answer_all(model, rows, values)
            else:
                _chat(model, values)
    except (flags.Error, ValueError) as error:
        _say(f"generate: {error}")
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        _say("generate: interrupted")
        raise SystemExit(130) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rows(values: flags.FlagValues) -> list[dict[str, Any]]:
    """The rows to answer, each with a `prompt`; none means a chat. Flags that make no sense raise ValueError."""
    if values.model is None:
        raise ValueError("--model is missing: a Hugging Face folder, .gguf file, hub id, package:NAME or run folder")
    if values.prompt is not None and values.prompts is not None:
        raise ValueError("--prompt and --prompts were both given; give one of them, or neither for a chat")
    if values.raw and values.system is not None:
        raise ValueError("--system needs the chat template, which --raw leaves out; drop one of them")
    if values.n > 1 and values.temperature == 0:
        raise ValueError(f"--n={values.n} greedy completions are all equal; set --temperature above 0")
    options = _options(values)
    length_bounds(options["max_new_tokens"], options["min_new_tokens"])
    sampling.make_limits(1, max_new=1, **{name: options[name] for name in DISTRIBUTION})  # its errors, before a load
    if values.out is not None:
        check_writable("--out", values.out)
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
        is_chat = isinstance(prompt, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in prompt)
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


def _options(values: flags.FlagValues) -> dict[str, Any]:
    """The flags that are options of `stream`."""
    names = (*DISTRIBUTION, "min_new_tokens", "stop", "bad_words", "n", "batch_size", "raw")
    lengths = _integers("max_new_tokens", values.max_new_tokens)
    if len(lengths) not in (1, 2):
        raise ValueError(f"--max_new_tokens={','.join(values.max_new_tokens)}: expected one number, or two: 32,256")
    return {name: values[name].value for name in names} | {
        "max_new_tokens": lengths[0] if len(lengths) == 1 else (lengths[0], lengths[1]),
        "stop_ids": None if values.stop_ids is None else _integers("stop_ids", values.stop_ids),
    }


def check_writable(flag: str, file: str) -> None:
    """Raises ValueError, before a model is read, where a flag's file can't be written."""
    path = Path(file).expanduser().absolute()
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={file}: its folder does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag}={file}: it can't be written")


def _integers(flag: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--{flag}={','.join(texts)}: expected whole numbers") from error


def _stream(model: Model, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[Completion]:
    own = model.stop_ids if options["stop_ids"] is None else options["stop_ids"]
    return stream(model.cfg, model.params, model.tokenizer, prompts, **{**options, "stop_ids": own})


def _answer_all(model: Model, rows: list[dict[str, Any]], values: flags.FlagValues) -> None:
    """Prints the completions (alone, if there is one; else under a heading each) and writes them to --out."""
    prompts, total = [_with_system(row["prompt"], values.system) for row in rows], len(rows) * values.n
    began = said = time.monotonic()

    def progress(ended: int, tokens: int) -> None:
        nonlocal said
        now = time.monotonic()
        if ended == total or now - said >= PROGRESS_SECONDS:
            said = now
            speed = f"{tokens} tokens in {now - began:.1f} s with compilation ({tokens / (now - began):.1f} a second)"
            _say(f"{ended} of {total} completions, {speed}")

    def tell(number: int, completion: Completion) -> None:
        prompt, sample = divmod(number, values.n)
        if total > 1:
            print(f"--- prompt {prompt}" + (f", sample {sample}" if values.n > 1 else ""))
            print(completion.text, flush=True)
        else:
            print(flush=True)  # its text has been printed
        if out is not None:
            answer = {
                "completion": completion.text,
                "sample": sample,
                "tokens": len(completion.tokens),
                "finished": completion.finished,
            }
            out.write(to_json({**rows[prompt], **answer}) + b"\n")
            out.flush()

    file = None if values.out is None else open(Path(values.out).expanduser(), "wb")
    with contextlib.nullcontext() if file is None else file as out:
        heard = {"on_text": _print_piece if total == 1 else None, "on_completion": tell, "on_progress": progress}
        _stream(model, prompts, {**_options(values), **heard, "seed": values.seed})


def _print_piece(number: int, text: str) -> None:
    print(text, end="", flush=True)


def _chat(model: Model, values: flags.FlagValues) -> None:
    """A conversation on the terminal until its input ends (with --raw: one text after the other)."""
    if not values.raw and chat.template_of(model.tokenizer) is None:
        raise ValueError("the model has no chat template; use --raw to continue texts instead")
    _say("Write a message; Ctrl-C ends an answer, /new begins a new conversation, /exit or Ctrl-D ends.")
    options = {**_options(values), "prompt_room": CHAT_ROOM}
    history: list[dict[str, str]] = []
    turn = 0
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            _say("\n/exit or Ctrl-D ends")
            continue
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/new":
            history = []
        elif text:
            turn += 1
            asked = [*history, {"role": "user", "content": text}]
            prompt = text if values.raw else _with_system(asked, values.system)
            answer: list[str] = []

            def show(number: int, piece: str, answer: list[str] = answer) -> None:
                answer.append(piece)
                _print_piece(number, piece)

            try:
                _stream(model, [prompt], {**options, "seed": values.seed + turn, "on_text": show})
            except KeyboardInterrupt:
                pass  # what was said up to here is the answer
            except ValueError as error:
                _say(f"{error}; /new begins a new conversation")
                continue
            print(flush=True)
            if answer:
                history = [*asked, {"role": "assistant", "content": "".join(answer)}]


if __name__ == "__main__":
    main()
