"""A reward model scores completions as `python -m jaxalign.score` scores rows, on any mesh, from text or token ids."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import runs
from common import GOLDEN, load_tokenizer, policy
from processes import two_processes

from jaxalign import generate, hf, metrics, score, sharding
from jaxalign.data import chat
from jaxalign.rewards import model

REWARD = GOLDEN / "models" / "llama" / "reward"
TEXTS = [
    ("Why is the sky blue?", " Because of Rayleigh scattering."),
    ("Hi", " Hello"),
    ("2 + 2 =", " 4, or 5\n"),
    ("", "!"),
]
CHATS = [
    ([{"role": "user", "content": prompt or "?"}], [{"role": "assistant", "content": text}]) for prompt, text in TEXTS
]
OTHER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("llama")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    cfg, params = hf.load(REWARD, head="score")
    return hf.save(tmp_path_factory.mktemp("reward") / "model", cfg, params, tokenizer_from=tokenizer)


@pytest.fixture(scope="module")
def rewards(tokenizer, folder):
    return model.load(str(folder), tokenizer)


def sampled(tokenizer, pairs, end="<|im_end|>"):
    """What a policy would have sampled: the completion's tokens and the id that ended it."""
    ends = tokenizer.convert_tokens_to_ids([end])
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for _, answer in pairs]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + ends for text in texts]


def scored(folder, pairs, **options):
    """What the command gives to the same rows."""
    loaded = generate.load(str(folder), head="score")
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    return [row["score"] for row in score.score(loaded.cfg, loaded.params, loaded.tokenizer, rows, **options)]


def ask(rewards, pairs, ids):
    values = rewards([prompt for prompt, _ in pairs], [answer for _, answer in pairs], ids)
    assert values.dtype == np.float32 and values.shape == (len(pairs),)
    return values


@pytest.mark.parametrize("pairs", [TEXTS, CHATS], ids=["texts", "chats"])
def test_completions_have_the_scores_of_the_command(tokenizer, folder, rewards, pairs):
    assert rewards.policy is tokenizer  # the sampled tokens are taken as they are
    want = scored(folder, pairs)
    assert np.std(want) > 1e-3
    np.testing.assert_allclose(ask(rewards, pairs, sampled(tokenizer, pairs)), want, rtol=0, atol=1e-5)
    cut_off = [ids[:-1] for ids in sampled(tokenizer, pairs)]
    np.testing.assert_allclose(ask(rewards, pairs, cut_off), want, rtol=0, atol=1e-5)
    anew = dataclasses.replace(rewards, policy=None)
    np.testing.assert_allclose(ask(anew, pairs, [[7]] * len(pairs)), want, rtol=0, atol=1e-5)


def test_tokenizers_are_the_same_if_they_make_the_same_of_all(tokenizer):
    others = [load_tokenizer("llama") for _ in range(4)]
    others[1].add_tokens(["sky"])
    others[2].chat_template = OTHER
    others[3].eos_token = "<|endoftext|>"
    assert [model._is_same(tokenizer, other) for other in others] == [True, False, False, False]


def test_sampled_tokens_are_not_made_anew(tokenizer, rewards):
    whole = tokenizer("scattering", add_special_tokens=False)["input_ids"]
    letters = [id for letter in "scattering" for id in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert letters != whole and tokenizer.decode(letters) == "scattering"
    prompt = [{"role": "user", "content": "Hi"}]
    found = rewards.encode(prompt, [{"role": "assistant", "content": "scattering"}], letters)
    before = chat.encode_prompt(tokenizer, prompt)
    assert found[: len(before)] == before and found[len(before) : len(before) + len(letters)] == letters
    assert found[len(before) + len(letters) :] == rewards._closing != []


def test_a_completion_of_several_turns_is_rendered(tokenizer, folder, rewards):
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    pair = [([{"role": "user", "content": "Hi"}], turns)]
    np.testing.assert_allclose(ask(rewards, pair, [[5, 6]]), scored(folder, pair), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["template", "tokenizer"])
def test_a_model_reads_completions_through_its_own_tokenizer_and_template(tokenizer, folder, tmp_path, change):
    cfg, params = hf.load(REWARD, head="score")
    own = load_tokenizer("llama" if change == "template" else "qwen2")
    if change == "template":
        own.chat_template = OTHER
    else:
        cfg = dataclasses.replace(cfg, vocab_size=max(cfg.vocab_size, len(own)))
        params = hf.load(REWARD, cfg, head="score")[1]
    other = hf.save(tmp_path / "model", cfg, params, tokenizer_from=own)
    rewards = model.load(str(other), tokenizer)
    assert rewards.policy is None
    for pairs in (TEXTS, CHATS):
        found = ask(rewards, pairs, sampled(tokenizer, pairs))
        np.testing.assert_allclose(found, scored(other, pairs), rtol=0, atol=1e-5)
    assert np.abs(found - scored(folder, CHATS)).max() > 1e-3


@pytest.mark.parametrize(
    "template",
    [
        # It strips answers; it shows the last answer with thoughts that the generation prompt does not open.
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ],
)
def test_a_template_that_does_more_than_to_write_an_answer_down_is_rendered(tmp_path, template):
    own = load_tokenizer("llama")
    own.chat_template = template
    folder = hf.save(tmp_path / "model", *hf.load(REWARD, head="score"), tokenizer_from=own)
    rewards = model.load(str(folder), own)
    assert rewards.policy is own and rewards._closing is None
    np.testing.assert_allclose(ask(rewards, CHATS, sampled(own, CHATS)), scored(folder, CHATS), rtol=0, atol=1e-5)


def test_texts_can_be_a_chat_and_rows_are_cut(tokenizer, folder):
    rewards = model.load(str(folder), tokenizer, as_chat=True, max_length=24)
    found = ask(rewards, TEXTS, sampled(tokenizer, TEXTS))
    np.testing.assert_allclose(found, scored(folder, TEXTS, as_chat=True, max_length=24), rtol=0, atol=1e-5)
    assert np.abs(found - scored(folder, TEXTS, as_chat=True)).max() > 1e-3


@pytest.mark.parametrize(
    "layout", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 4, "sequence": 2}, marks=pytest.mark.slow)]
)
def test_a_mesh_changes_no_score_and_holds_each_weight_once(tokenizer, folder, layout):
    mesh = sharding.make_mesh(**layout)
    rewards = model.load(str(folder), tokenizer, mesh=mesh, batch_size=3)
    assert rewards.batch_size == 4
    split = [leaf for leaf in jax.tree.leaves(rewards.params) if not leaf.sharding.is_fully_replicated]
    assert len(split) > len(jax.tree.leaves(rewards.params)) / 2
    np.testing.assert_allclose(ask(rewards, CHATS, sampled(tokenizer, CHATS)), scored(folder, CHATS), rtol=0, atol=1e-5)


def test_several_outputs_are_weighted(tokenizer, tmp_path):
    cfg = dataclasses.replace(hf.read_config(policy("llama")), num_labels=3, labels=("help", "truth", "harm"))
    cfg, params = hf.load(policy("llama"), dataclasses.replace(cfg, reward_weights=(1.0, 1.0, -0.5)), head="score")
    folder = hf.save(tmp_path / "model", cfg, params, tokenizer_from=tokenizer)
    rows = {
        "completion_ids": sampled(tokenizer, TEXTS),
        "prompts": [p for p, _ in TEXTS],
        "completions": [a for _, a in TEXTS],
    }
    for weights in (None, (0.0, 0.0, 2.0)):
        found = model.load(str(folder), tokenizer, weights=weights)(**rows)
        np.testing.assert_allclose(found, scored(folder, TEXTS, weights=weights), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="2 weights were given for the 3 outputs"):
        model.load(str(folder), tokenizer, weights=(1.0, 2.0))


def test_what_is_no_reward_model_is_refused(tokenizer, folder):
    with pytest.raises(ValueError, match="is a language model"):
        model.load(str(policy("llama")), tokenizer)
    with pytest.raises(ValueError, match="batch_size=0, max_length=None: expected at least 1"):
        model.load(str(folder), tokenizer, batch_size=0)


@pytest.mark.slow
def test_a_run_of_a_reward_model_is_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
    changes = {
        "model__random": None, "model__path": str(policy("llama")), "tokenizer__path": None, "loss__name": "reward",
        "steps": 2, "epochs": None, "data__eval__path": None, "eval__every": None, "samples__prompts": None,
        "samples__max_new_tokens": None, "checkpoint__every": 0,
    }  # fmt: skip
    run = runs.run(tmp_path / "run", **changes).folder
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    found = ask(model.load(str(run), tokenizer, mesh=mesh), CHATS, sampled(tokenizer, CHATS))
    np.testing.assert_allclose(found, scored(run, CHATS), rtol=0, atol=1e-5)


PROGRAM = """
from jaxalign.rewards import model
folder, rows = sys.argv[1], json.loads(sys.argv[2])
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
rewards = model.load(folder, hf.load_tokenizer(folder), mesh=mesh)
own = rows[:3] if jax.process_index() == 0 else rows[3:]
tell(rewards(*map(list, zip(*own))).tolist())
"""


@pytest.mark.slow
def test_each_process_has_the_scores_of_its_own_completions(tokenizer, folder, tmp_path):
    rows = [[*pair, ids] for pair, ids in zip(CHATS, sampled(tokenizer, CHATS), strict=True)]
    (first,), (second,) = two_processes(PROGRAM, tmp_path, folder, json.dumps(rows))
    assert (len(first), len(second)) == (3, 1)
    np.testing.assert_allclose(first + second, scored(folder, CHATS), rtol=0, atol=1e-5)
