"""Supervised fine-tuning against TRL: losses, metrics, gradients, a training curve; packed as unpacked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FIRST_FAMILY, LOSS, case, model, packed, positions
from programs import CFG, VOCAB, assert_golden_gradients, formula, hf_norms, in_two_programs

from jaxalign import losses, metrics, objectives, optim, step

CASES = ("sft_nll", "sft_completion_only", "sft_num_items", "sft_dft")
ROWS, TIME = 6, 90  # one program for all cases of a family


def text_batch(a, rows=ROWS, time=TIME):
    """TRL's batch, padded."""
    pad = lambda x, fill=0: np.pad(  # noqa: E731
        x, ((0, rows - len(x)), (0, time - x.shape[1])), constant_values=fill
    )
    tokens = pad(a["in.input_ids"])
    return {
        "tokens": tokens,
        "positions": positions(tokens),
        "mask": pad(a["in.labels"], -100) != -100,
        "lengths": pad(a["in.attention_mask"]).sum(axis=1).astype(np.int32),
    }


@pytest.mark.parametrize("family", FIRST_FAMILY)
@pytest.mark.parametrize("name", CASES)
def test_loss_metrics_and_gradients_equal_trl(name, family, monkeypatch):
    golden, a = case(family, name)
    cfg, params = model(family)
    batch = text_batch(a)
    objective = objectives.make(cfg, {"nll": "sft", "dft": "dft"}[golden["effective_config"]["loss_type"]])
    tokens = np.float32(batch["mask"][:, 1:].sum())
    np.testing.assert_array_equal(objective.denominators(batch)["tokens"], tokens)
    if golden["num_items_in_batch"]:  # the tokens of a global batch that this one is a part of
        batch["denominators"] = {"tokens": jnp.float32(golden["num_items_in_batch"])}
    loss, found, gradients, examples = in_two_programs(objective, params, batch, monkeypatch)
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    share = 1 if "denominators" not in batch else tokens / golden["num_items_in_batch"]
    np.testing.assert_allclose(objective.total(examples) * share, golden["loss"], **LOSS)
    values = metrics.reduce(found)
    for key in ("entropy", "mean_token_accuracy"):
        np.testing.assert_allclose(values[key], golden["metrics"][key], **LOSS, err_msg=key)
    assert batch["lengths"].sum() == golden["metrics"]["num_tokens"]
    assert_golden_gradients(gradients, golden, a, cfg)

    assert examples["tokens"].sum() == tokens and not examples["valid"][len(a["in.labels"]) :].any()
    np.testing.assert_allclose(examples["correct"].sum() / tokens, golden["metrics"]["mean_token_accuracy"], **LOSS)
    np.testing.assert_allclose(examples["nll"].sum() / tokens, values["nll"], rtol=1e-6)


@pytest.mark.parametrize("family", FIRST_FAMILY)
def test_a_training_curve_equals_trls(family):
    """Four real steps: AdamW, decay, linear schedule from 0, clipping at 1, two accumulation steps."""
    golden, a = case(family, "sft_train")
    cfg, params = model(family)
    config = golden["config"]
    batch = text_batch(a, len(a["in.labels"]))
    schedule = optim.make_schedule(
        "linear", config["learning_rate"], steps=config["max_steps"], warmup_steps=config["warmup_steps"]
    )
    tx = optim.make_optimizer("adamw", schedule=schedule, weight_decay=config["weight_decay"], b1=0.9, b2=0.999)
    train_step = jax.jit(
        step.make_train_step(objectives.make(cfg, "sft"), tx, gradient_accumulation_steps=2, max_grad_norm=1.0)
    )
    state, num_tokens = step.init_state(params, tx), 0
    for n, want in enumerate(golden["steps"]):
        state, found = train_step(state, None, batch)
        values = metrics.reduce(found)
        num_tokens += values["num_tokens"]
        assert float(schedule(n)) == pytest.approx(want["learning_rate"], rel=1e-6)
        assert num_tokens == want["num_tokens"]
        for key in ("loss", "grad_norm"):  # TRL's other numbers are means over micro-batches
            np.testing.assert_allclose(values[key], want[key], rtol=2e-3, err_msg=f"step {n + 1} {key}")
    norms = hf_norms(jax.device_get(state.params), cfg)
    for key, want in golden["final_param_norms"].items():
        np.testing.assert_allclose(norms[key], want, rtol=1e-5, err_msg=key)
    np.testing.assert_allclose(state.params["norm"]["scale"], a["out.final.model.norm.weight"], rtol=1e-5)


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_ones(name, monkeypatch):
    cfg, params = model("llama")
    batch = text_batch(case("llama", "sft_nll")[1])
    batch["weight"] = np.array([1, 0.5, 0, 2, 0.3, 1], np.float32)[:, None]
    rows = packed(batch, 1, per_row=3)
    objective = objectives.make(cfg, name)
    assert objective.group(rows) == objective.group(batch) == 1
    want, got = (in_two_programs(objective, params, each, monkeypatch) for each in (batch, rows))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for gradient, expected in zip(*map(jax.tree.leaves, (got[2], want[2])), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for key, value in metrics.reduce(want[1]).items():
        np.testing.assert_allclose(metrics.reduce(got[1])[key], value, rtol=1e-5, err_msg=key)
    for key, value in want[3].items():
        np.testing.assert_allclose(got[3][key][:6], value, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_the_loss_is_a_mean_over_tokens_by_hand(name, monkeypatch):
    """In float64, one token at a time. The first token of a text has nothing before it and counts nowhere."""
    formula(monkeypatch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (4, 9)).astype(np.int32)
    mask = rng.random((4, 9)) < 0.6
    mask[:, 0] = True
    mask[3] = False
    batch = {
        "tokens": tokens,
        "mask": mask,
        "positions": positions(tokens),
        "weight": np.float32([[1], [3], [0.5], [7]]),
    }
    kernel = rng.normal(0, 1, VOCAB)

    def losses_of(kernel):
        total = weights = 0.0
        for row, kept, weight in zip(tokens, mask, batch["weight"][:, 0], strict=True):
            for t in range(1, len(row)):
                if kept[t]:
                    nll = np.log1p(np.exp(kernel[row[t]] + 0.3 * kernel[row[t - 1]]))
                    total += weight * nll * (np.exp(-nll) if name == "dft" else 1)
                    weights += weight
        return total / weights

    objective = objectives.make(CFG, name)
    loss, found = objective({"kernel": np.float32(kernel)}, None, batch, {}, None)
    np.testing.assert_allclose(loss, losses_of(kernel), rtol=1e-5)
    assert metrics.reduce(found)["nll"] > 0
    empty = {**batch, "mask": np.zeros_like(mask)}
    assert float(objective({"kernel": np.float32(kernel)}, None, empty, {}, None)[0]) == 0


def test_dft_takes_the_unlikely_tokens_weight_away():
    logps = jnp.array([[-3.0, -0.1, 0.0, -40.0]])
    np.testing.assert_allclose(losses.TOKEN_LOSSES["dft"](logps), -np.exp(logps) * logps, rtol=1e-6)
    slope = jax.grad(lambda x: losses.TOKEN_LOSSES["dft"](x).sum())(logps)
    np.testing.assert_allclose(slope, -np.exp(logps), rtol=1e-6)  # its own probability, not 1
    np.testing.assert_allclose(jax.grad(lambda x: losses.TOKEN_LOSSES["sft"](x).sum())(logps), -np.ones((1, 4)))


def test_a_loss_of_chats_takes_no_options_and_no_partners():
    assert objectives.kind_of("sft") == objectives.kind_of("dft") == "chats"
    assert objectives.kind_of({"sigmoid": 1.0, "sft": 0.5}) == "pairs" and objectives.kind_of("tpo_l") == "triples"
    make = functools.partial(objectives.make, CFG)
    with pytest.raises(ValueError, match="takes .., not .'beta'."):
        make("sft", beta=0.1)
    with pytest.raises(ValueError, match="'dft' is no term of a sum; losses that can be summed: sigmoid"):
        make({"sigmoid": 1.0, "dft": 1.0})
    with pytest.raises(ValueError, match="no loss named 'sfd'; .*did you mean 'sft'"):
        make("sfd")
