"""Rows -> arrays, in chunks and in as many processes as there are cores."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.chat import Encoded, encode, encode_prompts
from jaxalign.data.formats import LABELLED, Example, RowError, read, read_number

log = logging.getLogger(__name__)

# Rows handed to the tokenizer at once.
CHUNK = 1000


@dataclass(frozen=True)
class Task:
    """Everything that decides what a row becomes; goes to the workers as JSON.

    Attributes: the arguments of `sources.prepare`; the tokenizer's chat template and files; whether some row has a
    margin; and {row: (reason, detail)} of the rows that the user's transform gave nothing for.
    """

    kind: str
    format: str
    max_length: int
    max_prompt_length: int | None
    on_long: str
    train_on: str | None
    score_columns: Sequence[str]
    weight_column: str | None
    chat_template: str | None
    tokenizer: str = field(repr=False)
    special_tokens: Mapping[str, str]
    margin: bool = False
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def values(self) -> list[str]:
        """What each column of an example's values is."""
        names = ["label"] * (self.kind in LABELLED) + ["margin"] * self.margin
        return names + ["scores"] * len(self.score_columns) + ["weight"] * (self.weight_column is not None)


@dataclass
class Chunk:
    """What a run of rows became. The lists have one entry an example, tokens and masks one a sequence."""

    tokens: list[list[int]] = field(default_factory=list)
    masks: list[list[bool]] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    prompt_hashes: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    dropped: dict[int, dict[str, Any]] = field(default_factory=dict)
    truncated: int = 0
    unfinished: int = 0


def read_lines(folder: Path, offsets: np.ndarray) -> list[bytes]:
    """The rows of texts.jsonl between these neighbouring offsets."""
    with open(folder / "texts.jsonl", "rb") as stream:
        stream.seek(int(offsets[0]))
        return stream.read(int(offsets[-1] - offsets[0])).splitlines()


def encode_lines(lines: Sequence[bytes], first_row: int, task: Task, tokenizer: Any) -> Chunk:
    """What rows become. A row is left out with the first reason that was found."""
    chunk = Chunk()
    examples: list[tuple[int, int, Example, list[float]]] = []

    def drop(row: int, error: RowError) -> None:
        chunk.dropped.setdefault(row, {"row": row, "reason": error.reason, "detail": error.detail})

    for number, line in enumerate(lines, first_row):
        try:
            if (why := task.refused.get(str(number))) is not None:
                raise RowError(*why)
            row = json.loads(line.decode("utf-8", errors="surrogatepass"))
            found = read(row, task.format, task.kind)
            values = _values(row, task)
        except RowError as error:
            drop(number, error)
            continue
        for side, example in enumerate(found):
            label = [float(bool(example.label))] if task.kind in LABELLED else []
            # A pair that became two examples: all that are chosen come before all that are rejected.
            examples.append((number, side if example.label is False else 0, example, label + values))
    encoded = _encode([example for *_, example, _ in examples], task, tokenizer)
    for (number, side, example, values), sequences in zip(examples, encoded, strict=True):
        fitting = sequences if isinstance(sequences, RowError) else _fit(sequences, task)
        if isinstance(fitting, RowError):
            drop(number, fitting)
            continue
        _add(chunk, fitting, task, tokenizer.eos_token_id)
        chunk.rows.append(number)
        chunk.sides.append(side)
        chunk.values.append(values)
        prompt = json.dumps(example.prompt or example.responses[0], sort_keys=True).encode()
        chunk.prompt_hashes.append(int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big"))
    return chunk


def _encode(examples: Sequence[Example], task: Task, tokenizer: Any) -> list[Encoded | RowError]:
    if task.kind != "prompts":
        return encode(tokenizer, examples, train_on=task.train_on)
    return [
        found if isinstance(found, RowError) else Encoded([found], [[False] * len(found)], len(found))
        for found in encode_prompts(tokenizer, [example.prompt for example in examples])
    ]


def _values(row: Mapping[str, Any], task: Task) -> list[float]:
    """The row's margin (0, a plain ranking, where this row has none), scores and weight."""
    values = []
    if task.margin:
        values.append(0.0 if row.get("margin") is None else read_number(row, "margin"))
    values += [read_number(row, name) for name in task.score_columns]
    if task.weight_column is not None:
        values.append(read_number(row, task.weight_column))
        if values[-1] < 0:
            raise RowError(f"{task.weight_column} is negative", "a weight is 0 or more")
    return values


def _fit(encoded: Encoded, task: Task) -> Encoded | RowError:
    """The example, if something that is scored remains of all sequences within max_length and the remains differ."""
    longest = max(map(len, encoded.sequences))
    prompt = encoded.prompt_length
    if task.kind == "prompts":
        if prompt == 0:
            return RowError("the prompt has no tokens")
        room = task.max_length > prompt
    elif all(map(any, encoded.masks)):
        room = all(any(mask[: task.max_length]) for mask in encoded.masks)
    else:
        return RowError("no token is scored", "the chat template marks none as the assistant's")
    if not room:
        return RowError("the prompt alone fills max_length", f"{prompt} tokens")
    if task.max_prompt_length is not None and prompt > task.max_prompt_length:
        return RowError("the prompt is longer than max_prompt_length", f"{prompt} tokens")
    if task.on_long == "drop" and longest > task.max_length:
        return RowError("longer than max_length", f"{longest} tokens")
    if len(encoded.sequences) > 1:
        chosen, rejected = encoded.sequences[:2]
        if chosen == rejected:
            return RowError("chosen and rejected are equal", "once tokenized")
        if chosen[: task.max_length] == rejected[: task.max_length]:
            return RowError("chosen and rejected are equal after the cut to max_length", f"{longest} tokens")
    if prompt >= task.max_length:
        # A conversation whose last answer is cut off: its last answer is now the last that remains.
        mask = encoded.masks[0][: task.max_length]
        last = task.max_length - 1 - mask[::-1].index(True)
        return encoded._replace(prompt_length=last + 1 - mask[last::-1].index(False))
    return encoded


def _add(chunk: Chunk, encoded: Encoded, task: Task, eos: int | None) -> None:
    """Adds the sequences of an example, cut to what may be needed."""
    prompt = encoded.prompt_length
    # A labelled completion also stands behind other prompts, which may be as short as one token.
    kept = task.max_length + (prompt if task.kind == "labelled" else 0)
    cut = [len(ids) > task.max_length for ids in encoded.sequences]
    chunk.tokens += [ids[:kept] for ids in encoded.sequences]
    chunk.masks += [mask[:kept] for mask in encoded.masks]
    chunk.prompt_lengths.append(prompt)
    chunk.truncated += any(cut)
    chunk.unfinished += sum(
        not was_cut and len(ids) > prompt and eos not in ids[prompt:]
        for was_cut, ids in zip(cut, encoded.sequences, strict=True)
    )


def encode_file(folder: Path, start: int, task: Task, tokenizer: Any) -> None:
    """Encodes the chunk of rows from `start` of texts.jsonl into files beside it."""
    offsets = np.load(folder / "text_offsets.npy", mmap_mode="r")[start : start + CHUNK + 1]
    chunk = encode_lines(read_lines(folder, offsets), start, task, tokenizer)
    np.savez(
        folder / f"chunk-{start}.npz",
        tokens=np.fromiter(itertools.chain.from_iterable(chunk.tokens), np.int32),
        mask=np.fromiter(itertools.chain.from_iterable(chunk.masks), bool),
        lengths=np.asarray([len(ids) for ids in chunk.tokens], np.int64),
        prompt_lengths=np.asarray(chunk.prompt_lengths, np.int32),
        rows=np.asarray(chunk.rows, np.int64),
        prompt_hashes=np.asarray(chunk.prompt_hashes, np.uint64),
        values=np.asarray(chunk.values, np.float32).reshape(len(chunk.rows), len(task.values)),
        sides=np.asarray(chunk.sides, np.int8),
    )
    dropped = [entry for _, entry in sorted(chunk.dropped.items())]
    counts = {"dropped": dropped, "truncated": chunk.truncated, "unfinished": chunk.unfinished}
    (folder / f"chunk-{start}.json").write_text(json.dumps(counts))


def run_workers(work: Path, task: Task, workers: int, total: int) -> None:
    """Encodes all chunks in processes of their own. Started as fresh interpreters (not spawned or forked by
    multiprocessing), they neither import the caller's script again nor inherit the threads of a device runtime."""
    (work / "task.json").write_text(json.dumps(asdict(task)))
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = (
        "import sys; from jaxalign.data.encoding import encode_worker; "
        "encode_worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    )
    logs = [open(work / f"worker-{n}.log", "wb") for n in range(workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(work), str(n), str(workers)],
            stdin=subprocess.DEVNULL,
            stdout=logs[n],
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )
        for n in range(workers)
    ]
    try:
        pending, told = dict(enumerate(processes)), time.monotonic()
        while pending:
            for n, process in list(pending.items()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                if process.returncode:
                    said = (work / f"worker-{n}.log").read_text(errors="replace").strip().splitlines()[-12:]
                    raise RuntimeError(f"tokenizing worker {n} ended with {process.returncode}:\n" + "\n".join(said))
                if process.returncode == 0:
                    del pending[n]
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.info("tokenized about %d of %d rows", CHUNK * len(list(work.glob("chunk-*.json"))), total)
    finally:
        for process, stream in zip(processes, logs, strict=True):
            if process.poll() is None:
                process.kill()
                process.wait()
            stream.close()


def encode_worker(folder: str, worker: int, workers: int) -> None:
    """The body of a worker process: encodes each chunk whose number is `worker` modulo `workers`."""
    import transformers

    path = Path(folder)
    task = Task(**json.loads((path / "task.json").read_text()))
    (path / f"tokenizer-{worker}.json").write_text(task.tokenizer, encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / f"tokenizer-{worker}.json"), **task.special_tokens
    )
    tokenizer.chat_template = task.chat_template
    total = len(np.load(path / "text_offsets.npy", mmap_mode="r")) - 1
    for start in range(worker * CHUNK, total, workers * CHUNK):
        encode_file(path, start, task, tokenizer)


def assemble(work: Path, starts: Iterable[int], task: Task) -> dict[str, Any]:
    """Joins the chunks into the final arrays, one chunk in memory at a time. Returns counts and the fingerprint."""
    parts: dict[str, list[np.ndarray]] = {
        "lengths": [np.empty(0, np.int64)],
        "prompt_lengths": [np.empty(0, np.int32)],
        "rows": [np.empty(0, np.int64)],
        "prompt_hashes": [np.empty(0, np.uint64)],
        "values": [np.empty((0, len(task.values)), np.float32)],
        "sides": [np.empty(0, np.int8)],
    }
    reasons: Counter[str] = Counter()
    truncated = unfinished = 0
    content = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        streams = {key: stack.enter_context(open(work / f"{key}.bin", "wb")) for key in ("tokens", "mask")}
        dropped = stack.enter_context(open(work / "dropped.jsonl", "w", encoding="utf-8"))
        for start in starts:
            with np.load(work / f"chunk-{start}.npz", allow_pickle=False) as chunk:
                for key, stream in streams.items():
                    content.update(data := chunk[key].tobytes())
                    stream.write(data)
                for key, values in parts.items():
                    values.append(chunk[key])
            counts = json.loads((work / f"chunk-{start}.json").read_text())
            for entry in counts["dropped"]:
                dropped.write(json.dumps(entry, ensure_ascii=False) + "\n")
                reasons[entry["reason"]] += 1
            truncated += counts["truncated"]
            unfinished += counts["unfinished"]
    joined = {key: np.concatenate(values) for key, values in parts.items()}
    joined["offsets"] = np.concatenate([[0], np.cumsum(joined.pop("lengths"))]).astype(np.int64)
    joined["order"] = np.argsort(joined.pop("sides"), kind="stable").astype(np.int64)
    for key, dtype in (("tokens", "<i4"), ("mask", "|b1")):
        _add_header(work / f"{key}.bin", work / f"{key}.npy", dtype, int(joined["offsets"][-1]))
    for key, array in joined.items():
        np.save(work / f"{key}.npy", array)
    for key in ("prompt_lengths", "offsets", "order", "values"):
        content.update(joined[key].tobytes())
    # Where a labelled example is cut is found only when it is read.
    cut = task.max_length if task.kind == "labelled" else None
    content.update(repr((task.kind, task.values, cut)).encode())
    if task.kind == "prompts":
        with open(work / "texts.jsonl", "rb") as rows:
            content.update(hashlib.file_digest(rows, "sha256").digest())
    for leftover in [*work.glob("chunk-*"), *work.glob("worker-*"), *work.glob("tokenizer-*"), *work.glob("*.bin")]:
        leftover.unlink()
    (work / "task.json").unlink(missing_ok=True)
    return {
        "kind": task.kind,
        "format": task.format,
        "max_length": task.max_length,
        "values": task.values,
        "kept": len(joined["rows"]),
        "dropped": dict(reasons.most_common()),
        "truncated": truncated,
        "unfinished": unfinished,
        "tokens": int(joined["offsets"][-1]),
        "fingerprint": content.hexdigest()[:32],
    }


def _add_header(raw: Path, file: Path, dtype: str, size: int) -> None:
    """Turns raw values into a file of one array, without reading them into memory."""
    with open(file, "wb") as out, open(raw, "rb") as stream:
        np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": (size,)})
        shutil.copyfileobj(stream, out, 1 << 22)
