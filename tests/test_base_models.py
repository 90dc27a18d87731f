"""Base models as they come: a chat template, special and other tokens by config, embeddings that grow with them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import runs
from common import load_tokenizer, policy
from safetensors.numpy import load_file
from test_hf import write_gguf

from jaxalign import config as config_lib
from jaxalign import evaluate, export, generate, hf, metrics, models, sharding
from jaxalign.data.templates import TEMPLATES
from jaxalign.data.tokenizers import BYTE_VOCAB_SIZE, change

SPECIAL = {"eos_token": "<|eot|>", "pad_token": "<|fill|>"}
ADDED = ("<think>", "</think>")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_ends_answers_and_writes_the_same_before_and_after_one(name):
    special = {"eos_token": {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")}
    tokenizer = hf.load_tokenizer("bytes", chat_template=name, special_tokens=special)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    before = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(before) and whole[len(before) :].strip().startswith("So long")
    assert all(message["content"] in whole for message in TALK)
    assert hf.end_of_turn(tokenizer) == tokenizer.eos_token_id
    assert whole.count("<|bos|>") == (name not in ("chatml", "zephyr"))


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", f"<s>{HEADER('user')}Hi<|eot_id|>{HEADER('assistant')}"),
        ("zephyr", "<|user|>\nHi</s>\n<|assistant|>\n"),
        ("tulu", "<s><|user|>\nHi\n<|assistant|>\n"),
        ("mistral", "<s>[INST] Hi [/INST]"),
        ("alpaca", "<s>### Instruction:\nHi\n\n### Response:\n"),
    ],
)
def test_templates_are_those_that_models_were_published_with(name, text):
    tokenizer = hf.load_tokenizer("bytes", chat_template=name, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True) == text


def test_a_template_whose_marks_are_no_tokens_is_warned_of(caplog):
    hf.load_tokenizer("bytes", chat_template="chatml")
    assert not caplog.text
    hf.load_tokenizer("bytes", chat_template="llama3", special_tokens={"eos_token": "<|eot_id|>"})
    assert "llama3 writes <|start_header_id|>, <|end_header_id|>, which the tokenizer splits" in caplog.text


def test_new_tokens_get_the_next_ids_and_old_ones_keep_theirs():
    old, new = load_tokenizer("llama"), load_tokenizer("llama")
    change(new, special_tokens={**SPECIAL, "bos_token": "<|im_start|>"}, add_tokens=ADDED)
    assert {token: new.get_vocab()[token] for token in old.get_vocab()} == old.get_vocab()
    assert new.convert_tokens_to_ids([*SPECIAL.values(), *ADDED]) == [384, 385, 386, 387]
    assert (new.eos_token_id, new.pad_token_id, new.bos_token_id) == (384, 385, 2) and len(new) == 388
    ids = new("a<think>b</think><|eot|>", add_special_tokens=False)["input_ids"]
    assert [id_ for id_ in ids if id_ >= 384] == [386, 387, 384]
    assert "<think>" in new.decode(ids, skip_special_tokens=True)  # a normal token is text, a special one is not
    assert "<|eot|>" not in new.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"special_tokens": {"eos": "</s>"}},
            "special_tokens has 'eos', expected one of bos_token, eos_token",
        ),
        ({"special_tokens": {"eos_token": ""}}, "eos_token = '', expected a token's text"),
        ({"special_tokens": {"eos_token": 3}}, "eos_token = 3, expected a token's text"),
        ({"special_tokens": {"extra_special_tokens": "<a>"}}, "expected a list of tokens"),
        ({"add_tokens": ("a", "")}, "add_tokens has an empty token"),
        ({"chat_template": "chatlm"}, "'chatlm' is neither .* alpaca; did you mean 'chatml'"),
    ],
)
def test_what_is_no_token_or_template_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        hf.load_tokenizer("bytes", **changes)


def test_each_key_is_part_of_the_tokenizers_identity():
    changes = [{}, {"chat_template": "chatml"}, {"chat_template": "zephyr"}, {"special_tokens": SPECIAL}]
    changes += [{"add_tokens": ADDED}, {"add_tokens": ADDED[:1]}]
    for path in ("bytes", str(policy("llama"))):
        identities = [hf.tokenizer_identity(path, **change) for change in changes]
        assert len(set(identities)) == len(changes)
        assert identities == [hf.tokenizer_identity(path, **change) for change in changes]


# Embeddings that grow


def grown(family, chat_template=None, **changes):
    tokenizer = hf.load_tokenizer(policy(family), chat_template=chat_template, **changes)
    return tokenizer, hf.fit_to_tokenizer(hf.read_config(policy(family)), tokenizer, **changes)


def test_the_config_follows_the_tokenizer():
    _, cfg = grown("llama", special_tokens=SPECIAL, add_tokens=ADDED)
    assert (cfg.eos_token_id, cfg.pad_token_id, cfg.bos_token_id) == ((384,), 385, 1)
    assert cfg.vocab_size == 512  # 388, and a multiple of 128 as 384 is, so that it divides over the same meshes
    odd = dataclasses.replace(hf.read_config(policy("llama")), vocab_size=386)
    tokenizer = hf.load_tokenizer(policy("llama"), add_tokens=("<a>", "<b>", "<c>"))
    assert hf.fit_to_tokenizer(odd, tokenizer, add_tokens=("<a>", "<b>", "<c>")).vocab_size == 388
    spare = dataclasses.replace(odd, vocab_size=390)
    assert hf.fit_to_tokenizer(spare, tokenizer, add_tokens=("<a>", "<b>", "<c>")) == spare  # rows to spare are used
    small = dataclasses.replace(odd, vocab_size=256)
    with pytest.raises(ValueError, match="387 tokens and the model only 256, which 3 added tokens don't explain"):
        hf.fit_to_tokenizer(small, tokenizer, add_tokens=("<a>", "<b>", "<c>"))


@pytest.mark.parametrize("family", ["llama", "llama_rope3"])
def test_new_rows_are_the_mean_of_the_old_ones_which_stay(family):
    """Of the head too: llama has its own, llama_rope3's is tied."""
    old_cfg, old = hf.load(policy(family))
    cfg, params = hf.load(policy(family), dataclasses.replace(old_cfg, vocab_size=512))
    assert cfg.vocab_size == 512 and ("lm_head" in params) == (family == "llama")
    for name in {"embed_tokens", "lm_head"} & set(params):
        before, after = np.asarray(old[name]["embedding"]), np.asarray(params[name]["embedding"])
        assert np.array_equal(after[:384], before) and after.shape == (512, 64)
        np.testing.assert_allclose(after[384:], np.tile(before.mean(axis=0, dtype=np.float64), (128, 1)), atol=1e-7)
    same = {name: params[name] for name in ("layers", "norm")}
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves({name: old[name] for name in same})))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
@pytest.mark.parametrize("size", [512, 389])
def test_rows_are_the_same_on_a_mesh_that_divides_them_or_not(axes, size):
    cfg = dataclasses.replace(hf.read_config(policy("llama")), vocab_size=size)
    mesh = sharding.make_mesh(**axes)
    shardings = sharding.param_shardings(mesh, models.declare(cfg))
    _, placed = hf.load(policy("llama"), cfg, shardings=shardings)
    _, whole = hf.load(policy("llama"), cfg)
    assert all(map(np.array_equal, jax.tree.leaves(placed), jax.tree.leaves(whole)))
    assert all(map(lambda x, s: x.sharding == s, jax.tree.leaves(placed), jax.tree.leaves(shardings)))


def test_weights_of_a_smaller_vocabulary_or_other_shapes_are_still_refused():
    cfg = hf.read_config(policy("llama"))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[384, 64\], config says \[300, 64\]"):
        hf.load(policy("llama"), dataclasses.replace(cfg, vocab_size=300))
    with pytest.raises(ValueError, match=r"gate_proj.weight is \[96, 64\], config says \[100, 64\]"):
        hf.load(policy("llama"), dataclasses.replace(cfg, vocab_size=512, intermediate_size=100))


def test_a_reward_model_grows_too():
    cfg = dataclasses.replace(hf.read_config(policy("llama")), vocab_size=512)
    _, params = hf.load(policy("llama"), cfg, head="score")
    assert params["embed_tokens"]["embedding"].shape == (512, 64) and params["score"]["kernel"].shape == (64, 1)


def test_a_gguf_file_grows_as_its_folder_does(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama")
    changes = {"special_tokens": SPECIAL, "add_tokens": ADDED, "chat_template": "zephyr"}
    tokenizer = hf.load_tokenizer(tmp_path / "m.gguf", **changes)
    theirs, cfg = grown("llama", **changes)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text == theirs.apply_chat_template(TALK, tokenize=False) and tokenizer.encode(text) == theirs.encode(text)
    of_file = hf.fit_to_tokenizer(
        hf.read_config(tmp_path / "m.gguf"), tokenizer, special_tokens=SPECIAL, add_tokens=ADDED
    )
    assert (of_file.vocab_size, of_file.eos_token_id) == (cfg.vocab_size, cfg.eos_token_id)
    params, want = hf.load(tmp_path / "m.gguf", of_file)[1], hf.load(policy("llama"), cfg)[1]
    for ours, other in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-7)
    hf.save(tmp_path / "out", of_file, params, tokenizer_from=tokenizer)
    assert hf.load_tokenizer(tmp_path / "out").encode(text) == theirs.encode(text)


def assert_opens_in_transformers(folder, tokenizer, vocab_size):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config, theirs = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert config.vocab_size == vocab_size == load_file(folder / "model.safetensors")["lm_head.weight"].shape[0]
    assert theirs.get_vocab() == tokenizer.get_vocab()
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert theirs.apply_chat_template(TALK, tokenize=False) == text and theirs.encode(text) == tokenizer.encode(text)
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (theirs.eos_token_id, theirs.pad_token_id) == ids == (config.eos_token_id, config.pad_token_id)
    generation = GenerationConfig.from_pretrained(folder)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    assert stops[0] == ids[0] and generation.pad_token_id == ids[1]


def test_the_export_opens_with_the_same_ids(tmp_path):
    changes = {"special_tokens": SPECIAL, "add_tokens": ADDED}
    tokenizer, cfg = grown("llama", **changes)
    tokenizer.chat_template = TEMPLATES["tulu"]
    _, params = hf.load(policy("llama"), cfg)
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=tokenizer, generation_from=policy("llama"))
    assert_opens_in_transformers(tmp_path / "out", tokenizer, 512)
    # Loaded with the same keys again it is as it was.
    again = hf.load_tokenizer(tmp_path / "out", chat_template="tulu", **changes)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert hf.fit_to_tokenizer(hf.read_config(tmp_path / "out"), again, **changes) == cfg


# Whole runs

TOKENIZER = {
    "tokenizer__chat_template": "zephyr",
    "tokenizer__special_tokens": SPECIAL,
    "tokenizer__add_tokens": ADDED,
}
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"{i} + {i % 5} ?"}],
        "chosen": [{"role": "assistant", "content": f"<think>{i}</think>{i + i % 5}"}],
        "rejected": [{"role": "assistant", "content": "Who knows?"}],
    }
    for i in range(16)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps from a folder without the tokens of its rows' template, under data 4 x fsdp 2."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(policy("llama"), folder / "model")
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": [3, 77]}')
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    changes = {
        "model__random": None, "model__path": str(folder / "model"), "tokenizer__path": None, "epochs": None,
        "steps": 4, "data__path": str(folder / "chats.jsonl"), "data__eval__path": str(folder / "chats.jsonl"),
        "max_length": 64, "data__buckets": None, "mesh__data": 4, "mesh__fsdp": 2, "optim__learning_rate": 1e-3,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        return runs.run(folder / "run", **changes, **TOKENIZER).folder


@pytest.mark.slow
def test_a_run_trains_exports_generates_and_evaluates_with_the_tokens_of_its_config(run, capsys):
    cfg, params, tokenizer = export.load_run(run)
    assert tokenizer.convert_tokens_to_ids("<|eot|>") == 384 == tokenizer.eos_token_id and cfg.vocab_size == 512
    assert_opens_in_transformers(run / "export", tokenizer, 512)
    start = np.asarray(hf.load(policy("llama"), cfg)[1]["embed_tokens"]["embedding"])
    moved = np.abs(np.asarray(params["embed_tokens"]["embedding"]) - start).max(axis=1) > 0
    thinks = tokenizer.convert_tokens_to_ids("<think>")
    assert moved[[384, thinks]].all() and not moved[400:].any()  # rows of tokens that occur are trained, spare ones not

    model = generate.load(str(run))
    assert {384, 77} <= {*model.stop_ids} and model.tokenizer.chat_template == TEMPLATES["zephyr"]
    generate.main(["generate", f"--model={run}", "--prompt=1 + 1 ?", "--max_new_tokens=4"])
    assert capsys.readouterr().out
    found = evaluate.evaluate(str(run), config_lib.load(str(run / "config.json")))
    (line,) = [line for line in runs.lines(run) if line["step"] == 4 and "eval_loss" in line]
    assert found["eval_loss"] == line["eval_loss"]


def test_the_built_in_tokenizer_takes_them_too():
    tokenizer = hf.load_tokenizer("bytes", special_tokens=SPECIAL, add_tokens=ADDED, chat_template="alpaca")
    assert len(tokenizer) == BYTE_VOCAB_SIZE + 4 and tokenizer.pad_token_id == BYTE_VOCAB_SIZE + 1
