"""Sample weights in every loss: 0 is as if the example were not there, 2 as if it were there twice; packed rows too."""

import types

import jax
import numpy as np
import pytest
from common import packed, positions
from programs import CFG, VOCAB, formula, log_probs

from jaxalign import objectives, step
from jaxalign.objectives import LOSSES, WIDTHS, batches

LENGTH = 12
TIMES = (2, 1, 0, 1, 1, 2)
"""How often each example is there. The one that is not has tokens of its own, the last VOCAB - UNIQUE."""
UNIQUE = 30

SUMS = ({"sigmoid": 1.0, "aot": 0.4, "sft": 0.5}, {"tpo": 1.0, "tpo_ipo": 0.1}, {"simpo": 1.0, "orpo": 0.3})
OPTIONS = {
    "ipo": {"use_weighting": True},
    "sigmoid": {"ld_alpha": 0.5},
    "simpo": {"cpo_alpha": 0.3},
    "kto": {"desirable_weight": 1.4, "undesirable_weight": 0.8},
    "reward": {"center_rewards_coefficient": 0.2},
    "grpo": {"beta": 0.1, "importance_sampling_correction": True, "off_policy_mask_threshold": 0.1},
    "dr_grpo": {"mask_truncated_completions": True, "max_completion_length": 9},
    "vespo": {"entropy_coef": 0.1},
    "gspo": {"importance_sampling_level": "sequence_token", "epsilon": 0.1, "epsilon_high": 0.2},
}
POLICY = ("advantages", "truncated", "old_logps", "sampling_logps")
ATTRIBUTES = types.SimpleNamespace(num_labels=3)

every_loss = pytest.mark.parametrize("loss", [*LOSSES, *SUMS], ids=str)


def make(loss):
    options = {} if isinstance(loss, dict) else OPTIONS.get(loss, {})
    return objectives.make(ATTRIBUTES if loss == "attributes" else CFG, loss, **options)


def examples_of(loss, width):
    """Six examples of random tokens: {leaf: [6, width, ...]}."""
    rng = np.random.default_rng(1)
    n, prompt = len(TIMES), 3
    tokens = rng.integers(0, UNIQUE, (n, width, LENGTH)).astype(np.int32)
    tokens[TIMES.index(0)] = rng.integers(UNIQUE, VOCAB, (width, LENGTH))
    tokens[:, :, :prompt] = tokens[:, :1, :prompt]  # sequences of an example begin alike
    lengths = rng.integers(prompt + 1, LENGTH + 1, (n, width)).astype(np.int32)
    inside = np.arange(LENGTH) < lengths[..., None]
    once = lambda values: np.repeat(values.astype(np.float32)[:, None], width, axis=1)  # noqa: E731
    found = {
        "tokens": np.where(inside, tokens, 0),
        "positions": positions(tokens.reshape(-1, LENGTH)).reshape(tokens.shape),
        "mask": inside & (np.arange(LENGTH) >= prompt),
        "lengths": lengths,
        "ends": lengths - 1,
        "weight": once(0.1 * np.array(TIMES)),
        "label": once(np.array([1, 0, 1, 1, 0, 0])),
        "margin": once(rng.uniform(0, 1, n)),
        "scores": once(rng.normal(0, 1, (n, 3))),
        "advantages": once(rng.normal(0.5, 1, n)),
        "truncated": once(np.array([0, 1, 0, 0, 0, 0])),
    }
    found["scores"][1, :, 0] = np.nan
    kernel = rng.normal(0, 1, VOCAB).astype(np.float32)
    rows = {name: found[name].reshape(n * width, LENGTH) for name in ("tokens", "mask")}
    found["ref_logps"] = np.asarray(log_probs(kernel, rows)).reshape(tokens.shape)
    mine = np.asarray(log_probs(parameters()["kernel"], rows)).reshape(tokens.shape)
    for name in ("old_logps", "sampling_logps"):
        found[name] = mine + rng.normal(0, 0.2, tokens.shape).astype(np.float32)
    of_kind = {"labelled": {"label"}, "singles": {"label"}, "scored": {"scores"}, "prompts": POLICY}
    names = set(of_kind.get(objectives.kind_of(loss), ()))
    names |= {"margin"} if loss == "reward" else set()
    names |= {"ref_logps"} if make(loss).needs_reference else set()
    some = {"label", "scores", "margin", "ref_logps", *POLICY}
    return {name: x for name, x in found.items() if name in names or name not in some}


def batch_of(examples, chosen, size=8):
    """The chosen examples and fillers up to `size`, unpacked."""

    of_rows = ("tokens", "positions", "mask", "lengths", "ref_logps", "old_logps", "sampling_logps")

    def rows(name, x):
        x = np.concatenate([x[list(chosen)], np.zeros((size - len(chosen), *x.shape[1:]), x.dtype)])
        if name == "ends":
            x[len(chosen) :] = -1
        x = x.reshape(-1, *x.shape[2:])
        return x if name in of_rows else x.reshape(len(x), 1, *x.shape[1:])

    return {name: rows(name, x) for name, x in examples.items()}


def parameters():
    return {"kernel": np.random.default_rng(2).normal(0, 1, VOCAB).astype(np.float32)}


def loss_and_gradient(objective, batch, **options):
    gradients_of = step.make_gradients(objective, **options)
    loss, _, gradients = gradients_of(parameters(), None, batch, objective.init_aux())
    return float(loss), np.asarray(gradients["kernel"])


def assert_same(got, want, rtol=1e-6):
    assert np.abs(want[1]).max() > 1e-4
    np.testing.assert_allclose(got[0], want[0], rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=rtol * np.abs(want[1]).max())


@every_loss
def test_a_weight_is_how_often_an_example_is_there_packed_or_not(loss, monkeypatch):
    """Weights of a tenth of that: what they are times changes nothing."""
    formula(monkeypatch)
    objective = make(loss)
    examples = examples_of(loss, objective.width)
    repeated = batch_of(examples, np.repeat(np.arange(len(TIMES)), TIMES))
    del repeated["weight"]
    want = loss_and_gradient(objective, repeated)
    weighted = batch_of(examples, range(len(TIMES)))
    got = loss_and_gradient(objective, weighted)
    assert_same(got, want)
    assert not got[1][UNIQUE:].any()
    rows = packed({name: x for name, x in weighted.items() if name != "ends"}, objective.width)
    assert rows["ends"].shape == (4, 2 * objective.width)
    assert_same(loss_and_gradient(objective, rows), want)

    # What an evaluation says of the whole is the same number, in parts or not.
    found = jax.device_get(objective.examples(parameters(), None, weighted))
    assert objective.total(found) == pytest.approx(want[0], rel=1e-5)
    kept = {name: x[found["valid"]] for name, x in found.items()}
    assert len(kept["loss"]) == len(TIMES) and objective.total(kept) == pytest.approx(want[0], rel=1e-5)


SLOW = [pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES if loss == "tpo" or make(loss).couples]


@pytest.mark.parametrize("loss", ["sft", SUMS[0], *SLOW], ids=str)
def test_a_split_of_weighted_examples_changes_nothing(loss, monkeypatch):
    formula(monkeypatch)
    objective = make(loss)
    batch = batch_of(examples_of(loss, objective.width), range(len(TIMES)))
    want = loss_and_gradient(objective, batch)
    rows = packed({name: x for name, x in batch.items() if name != "ends"}, objective.width)
    for whole in (batch, rows):
        assert_same(loss_and_gradient(objective, whole, gradient_accumulation_steps=2), want)


@pytest.mark.parametrize("loss", ["sigmoid", {"sigmoid": 1.0, "orpo": 0.5}], ids=str)
def test_known_log_probs_of_responses_take_the_models_place_unless_prompts_count(loss, monkeypatch):
    formula(monkeypatch)
    objective = make(loss)
    batch = batch_of(examples_of(loss, 2), range(len(TIMES)))
    params = parameters()
    want = objective.examples(params, None, batch)
    batch["logps"] = np.asarray(log_probs(params["kernel"], batch))
    got = objective.examples(params if loss != "sigmoid" else {}, None, batch)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_every_kind_of_example_is_there():
    assert {LOSSES[name].kind for name in LOSSES} == set(WIDTHS)


def test_an_ordinal_counts_the_masked_tokens_of_each_sequence():
    segments = np.array([[3, 3, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 0, 0, 0, 0]], np.int32)
    mask = np.array([[0, 0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1, 0, 0, 0, 0]], bool)
    batch = {"tokens": segments, "segment_ids": segments, "ends": np.array([[4, 8], [3, 5]])}
    want = [[0, 0, 0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 1, 2, 0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(batches.ordinal(mask, batch), want)
    np.testing.assert_array_equal(batches.inside(batch), (segments == 1) | (segments == 2))
    np.testing.assert_array_equal(batches.follows(batch)[:, 1:], segments[:, 1:] == segments[:, :-1])
