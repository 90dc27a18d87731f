"""Reward models score rows as transformers would: the head's output at the last token, whatever batch a row is in."""

import dataclasses
import itertools
import json
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from common import GOLDEN, case, policy

from jaxalign import export, generate, hf, metrics, models, score, sharding
from jaxalign.data import chat

REWARD = GOLDEN / "models" / "llama" / "reward"
ROWS = [
    {"prompt": "Why is the sky blue?", "response": " Because of Rayleigh scattering.", "id": 1},
    {"prompt": "Hi", "completion": " Hello"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you"}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "response": [{"role": "assistant", "content": "Hello, you"}]},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5, as everybody knows who has ever counted at all"},
]


@pytest.fixture(scope="module")
def reward():
    return *hf.load(REWARD, head="score"), hf.load_tokenizer(policy("llama"))


@pytest.fixture(scope="module")
def folder(reward, tmp_path_factory):
    return hf.save(tmp_path_factory.mktemp("reward") / "model", *reward[:2], tokenizer_from=reward[2])


def one_by_one(cfg, params, ids) -> np.ndarray:
    """The naive way: a row alone, the scores of all its tokens, that of the last one taken."""
    tokens = jnp.zeros((1, 128), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    hidden = _hidden(cfg, params, tokens, jnp.arange(128)[None])[0]
    return np.asarray(models.value(cfg, params, hidden))[0, len(ids) - 1]


_hidden = jax.jit(models.apply, static_argnums=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_values_are_trls_at_the_last_token_of_each_row(family):
    cfg, params = hf.load(GOLDEN / "models" / family / "reward", head="score")
    info, arrays = case(family, "reward_bt")
    lengths = arrays["in.attention_mask"].sum(axis=1)
    rows = [tokens[:length].tolist() for tokens, length in zip(arrays["in.input_ids"], lengths, strict=True)]
    values = score.values(cfg, params, rows, 12, 512, None)[:, 0]
    want = np.concatenate([arrays["out.rewards.chosen"], arrays["out.rewards.rejected"]])
    np.testing.assert_allclose(values, want, rtol=0, atol=1e-4)


def test_rows_keep_their_fields_and_order_and_get_the_score_of_their_own_tokens(reward):
    cfg, params, tokenizer = reward
    found = list(score.score(cfg, params, tokenizer, ROWS))
    for row, scored in zip(ROWS, found, strict=True):
        assert {name: scored[name] for name in row} == row
    end = tokenizer.eos_token
    texts = [ROWS[0]["prompt"] + ROWS[0]["response"], "Hi Hello", None, None]
    texts += [ROWS[4]["prompt"] + ROWS[4][side] for side in ("chosen", "rejected")]
    asked = [found[0]["score"], found[1]["score"], found[2]["score"], found[3]["score"]]
    asked += [found[4]["score_chosen"], found[4]["score_rejected"]]
    talk = tokenizer.apply_chat_template(ROWS[2]["messages"], tokenize=True, return_dict=False)
    for text, value in zip(texts, asked, strict=True):
        ids = talk if text is None else chat.encode_prompt(tokenizer, text + end)
        np.testing.assert_allclose(value, one_by_one(cfg, params, ids)[0], atol=1e-5)
    assert found[2]["score"] == found[3]["score"]
    again = list(score.score(cfg, params, tokenizer, iter(ROWS), batch_size=2))  # other company, other chunks
    np.testing.assert_allclose(
        [row.get("score", 0) for row in again], [row.get("score", 0) for row in found], atol=1e-5
    )


def test_text_becomes_a_chat_where_that_is_asked_for(reward):
    (found,) = score.score(*reward, [{"prompt": "Hi", "response": "Hello, you"}], as_chat=True)
    assert found["score"] == next(score.score(*reward, ROWS[2:3]))["score"]


def test_a_side_that_repeats_its_prompt_is_scored_once(reward):
    prompt = [{"role": "user", "content": "2 + 2?"}]
    sides = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "4"), ("rejected", "5"))}
    whole = {name: prompt + side for name, side in sides.items()}
    apart, repeated, alone = score.score(*reward, [{"prompt": prompt, **sides}, {"prompt": prompt, **whole}, whole])
    assert {apart["score_chosen"]} == {repeated["score_chosen"], alone["score_chosen"]}
    assert apart["score_chosen"] != apart["score_rejected"]


def test_long_rows_are_cut_at_their_end(reward):
    cfg, params, tokenizer = reward
    row = {"prompt": "xz" * 30, "response": "yw" * 30}
    (found,) = score.score(cfg, params, tokenizer, [row], max_length=64)
    ids = chat.encode_prompt(tokenizer, row["prompt"] + row["response"] + tokenizer.eos_token)
    assert len(ids) > 64
    np.testing.assert_allclose(found["score"], one_by_one(cfg, params, ids[:64])[0], atol=1e-5)
    (whole,) = score.score(cfg, params, tokenizer, [row])
    assert abs(whole["score"] - found["score"]) > 1e-4


def attributes():
    """A model with three named outputs."""
    cfg = dataclasses.replace(hf.read_config(policy("llama")), num_labels=3, labels=("help", "truth", "harm"))
    return hf.load(policy("llama"), dataclasses.replace(cfg, reward_weights=(1.0, 1.0, -0.5)), head="score")


def test_several_outputs_have_their_names_and_a_weighted_sum(reward):
    cfg, params = attributes()
    tokenizer = reward[2]
    (row,) = score.score(cfg, params, tokenizer, ROWS[:1])
    assert list(row["scores"]) == ["help", "truth", "harm"]
    help_, truth, harm = row["scores"].values()
    assert row["score"] == pytest.approx(help_ + truth - 0.5 * harm)
    (other,) = score.score(cfg, params, tokenizer, ROWS[:1], weights=[0, 0, -1], column="r")
    assert other["r"] == pytest.approx(-harm) and other["rs"] == row["scores"]
    (pair,) = score.score(cfg, params, tokenizer, ROWS[4:])
    assert len(pair["scores_chosen"]) == 3 and pair["score_rejected"] != pair["score_chosen"]


def test_a_mesh_changes_no_score(reward):
    cfg, params, tokenizer = reward
    want = [row["score"] for row in score.score(cfg, params, tokenizer, ROWS[:4])]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with sharding.use_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        found = [row["score"] for row in score.score(cfg, placed, tokenizer, ROWS[:4], batch_size=3, mesh=mesh)]
    np.testing.assert_allclose(found, want, atol=1e-5)


def command(*arguments):
    score.main(["score", *map(str, arguments)])


def test_the_command_writes_jsonl(reward, folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = (f"--model={folder}", f"--data={tmp_path / 'rows.jsonl'}")
    command(*flags, f"--out={tmp_path / 'out.jsonl'}")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    want = list(score.score(*reward, ROWS))
    assert [list(row) for row in written] == [list(row) for row in want]
    np.testing.assert_allclose([row["score"] for row in written[:4]], [row["score"] for row in want[:4]], atol=1e-5)
    command(*flags)
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == written
    assert "5 rows scored in" in printed.err


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a"}, {}, "row 0 has the columns prompt; expected prompt and response"),
        ({"prompt": "a", "response": "b", "score": 1.0}, {}, "row 0 has a column score already"),
        ({"prompt": 3, "response": "b"}, {}, "row 0: got 3, expected text or chat messages"),
        ("text", {}, "row 0 is no JSON object"),
        ({"prompt": "a", "response": "b"}, {"weights": [1.0, 2.0]}, "2 weights were given for the 1 outputs"),
    ],
)
def test_what_cannot_be_scored_is_named(reward, row, options, message):
    with pytest.raises(ValueError, match=message):
        list(score.score(*reward, [row], **options))


def test_a_language_model_is_refused(reward, tmp_path, capsys):
    cfg, params = hf.load(policy("llama"))
    with pytest.raises(ValueError, match="without a score head"):
        next(score.score(cfg, params, reward[2], ROWS))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for flags, message in (
        ((f"--model={policy('llama')}", f"--data={tmp_path / 'rows.jsonl'}"), "is a language model"),
        ((f"--model={REWARD}",), "--data is missing"),
        ((f"--model={REWARD}", "--data=x", "--out=/nowhere/at/all"), "folder does not exist"),
        ((f"--model={REWARD}", "--weigths=1"), "weigths"),
        ((f"--model={REWARD}", f"--data={tmp_path / 'rows.jsonl'}", "--tensor=3"), "needs a multiple of 3 devices"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(*flags)
        assert ended.value.code == 2 and message in capsys.readouterr().err


# Reward models as Hugging Face folders


def test_a_reward_model_says_in_its_config_what_transformers_needs(reward, tmp_path):
    from transformers import AutoConfig

    cfg, params = attributes()
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=policy("llama"))
    assert not (tmp_path / "out" / "generation_config.json").exists()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"] and written["num_labels"] == 3
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.num_labels == 3 and theirs.id2label == {0: "help", 1: "truth", 2: "harm"}
    assert theirs.problem_type == "regression" and theirs.pad_token_id == 0
    again, weights = hf.load(tmp_path / "out", head="score")
    assert again == cfg
    assert all(map(np.array_equal, jax.tree.leaves(weights), jax.tree.leaves(params)))
    assert hf.load(policy("llama"), cfg)[0].labels == ()  # read as a language model it has none


def test_the_pad_token_of_a_score_model_ends_no_sequence(tmp_path):
    """transformers reads the score at the last token that is no pad: with pad = eos at the one before the last."""
    cfg, params = hf.load(REWARD, head="score")
    for special, want in (({}, 0), ({"pad_token": "<|im_end|>"}, 1)):  # 1: the beginning token
        tokenizer = hf.load_tokenizer(policy("llama"), special_tokens=special)
        asked = hf.fit_to_tokenizer(cfg, tokenizer, special_tokens=special)
        folder = tmp_path / str(want)
        hf.save(folder, asked, params, tokenizer_from=tokenizer)
        assert hf.read_config(folder).pad_token_id == want == hf.load_tokenizer(folder).pad_token_id
        ids = tokenizer("a<|im_end|>")["input_ids"]
        padded = np.array([*ids, want, want])
        assert int((np.arange(len(padded)) * (padded != want)).argmax()) == len(ids) - 1


@pytest.mark.slow
def test_a_run_of_adapters_and_its_export_score_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
    changes = {
        "model__random": None, "model__path": str(policy("llama")), "tokenizer__path": None, "loss__name": "reward",
        "lora__rank": 2, "steps": 3, "epochs": None, "data__eval__path": None, "eval__every": None,
        "samples__prompts": None, "samples__max_new_tokens": None, "checkpoint__every": 0,
    }  # fmt: skip
    run = runs.run(tmp_path / "run", **changes).folder
    of_run = generate.load(str(run), head="score")
    of_export = generate.load(str(run / "export"), head="score")
    assert of_run.cfg.num_labels == 1 and of_export.tokenizer.pad_token_id == of_export.cfg.pad_token_id == 0
    rows = runs.rows(6)
    adapter = export.export(run, tmp_path / "adapter", adapter=True)
    beside = generate.load(str(policy("llama")), head="score", adapter=str(adapter))
    ours, *others = (list(score.score(m.cfg, m.params, m.tokenizer, rows)) for m in (of_run, of_export, beside))
    for theirs, name in itertools.product(others, ("score_chosen", "score_rejected")):
        np.testing.assert_allclose([row[name] for row in ours], [row[name] for row in theirs], atol=1e-5)
    untrained = hf.load(policy("llama"), head="score")
    first = list(score.score(*untrained, of_run.tokenizer, rows))
    assert max(abs(row["score_chosen"] - old["score_chosen"]) for row, old in zip(ours, first, strict=True)) > 1e-3


TORCH = os.environ.get("JAXALIGN_TORCH_PYTHON")  # of an environment with torch and transformers

THEIRS = """
import json, sys, torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
rows = json.loads(sys.argv[2])
batch = tokenizer(rows, padding=True, truncation=True, max_length=512, return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**batch).logits.tolist()))
"""


@pytest.mark.skipif(TORCH is None, reason="set JAXALIGN_TORCH_PYTHON to a python with torch and transformers")
def test_transformers_opens_what_we_write_and_scores_the_same(tmp_path):
    cfg, params = attributes()
    tokenizer = hf.load_tokenizer(policy("llama"), special_tokens={"pad_token": "<|im_end|>"})
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=tokenizer)
    rows = [{"prompt": "Hi", "response": " Hello"}, {"prompt": "A longer one", "response": " than the other"}]
    ours = list(score.score(cfg, params, tokenizer, rows))
    texts = [row["prompt"] + row["response"] + tokenizer.eos_token for row in rows]
    done = subprocess.run([TORCH, "-c", THEIRS, tmp_path / "out", json.dumps(texts)], capture_output=True, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose([list(row["scores"].values()) for row in ours], theirs, atol=1e-4)
