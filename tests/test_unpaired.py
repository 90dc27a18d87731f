"""KTO, APO-zero and BCO of single responses: by formula, against TRL through our own model, and what may not matter."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import FIRST_FAMILY, LOSS, REWARD, SEQUENCE_LOGPS, case, model, packed, positions
from jax.test_util import check_grads
from programs import assert_golden_gradients, forward_and_pullback

from jaxalign import logprobs, losses, metrics, objectives, optim, sharding, step
from jaxalign.losses import unpaired

CASES = ("kto", "kto_swapped", "kto_weights", "kto_apo_zero_unpaired", "kto_from_paired")
NAMES = tuple(losses.UNPAIRED)
ROWS, TIME = 8, 64  # one program for all golden cases of a family

sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


# The losses


def responses(n=9, seed=0):
    rng = np.random.default_rng(seed)
    logps = rng.uniform(-40, -5, n)
    return [np.float32(x) for x in (logps, logps + rng.normal(0, 6, n))], rng.integers(0, 2, n)


def one(name, logp, ref_logp, label, point, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """The papers' formulas of one example in float64, gains and losses written apart."""
    x = float(logp) - float(ref_logp)
    if name == "bco":
        return -math.log(sigmoid(beta * x - point)) if label else -math.log(sigmoid(-(beta * x - point)))
    point = 0.0 if name == "apo_zero_unpaired" else point
    value = sigmoid(beta * (x - point)) if label else sigmoid(beta * (point - x))
    return (desirable_weight if label else undesirable_weight) * (1 - value)


def call(name, logps, ref_logps, label, point, **options):
    point = () if name == "apo_zero_unpaired" else (point,)
    return losses.UNPAIRED[name](logps, ref_logps, label, *point, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kto", {}),
        ("kto", {"beta": 0.4, "desirable_weight": 1.33, "undesirable_weight": 0.0}),
        ("apo_zero_unpaired", {}),
        ("apo_zero_unpaired", {"beta": 0.3, "desirable_weight": 0.2, "undesirable_weight": 2.0}),
        ("bco", {}),
        ("bco", {"beta": 0.4}),
    ],
)
def test_losses_equal_the_formulas_and_have_their_gradients(name, options):
    (logps, ref_logps), label = responses()
    got, logged = call(name, logps, ref_logps, label, 0.7, **options)
    want = [one(name, *each, 0.7, **options) for each in zip(logps, ref_logps, label, strict=True)]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(logged["rewards"], options.get("beta", 0.1) * (logps - ref_logps), rtol=1e-5)
    assert got.dtype == jnp.float32 == call(name, jnp.bfloat16(logps), jnp.bfloat16(ref_logps), label, 0.7)[0].dtype
    np.testing.assert_array_equal(got, call(name, logps, ref_logps, label.astype(bool), 0.7, **options)[0])
    check_grads(lambda x: call(name, x, ref_logps, label, 0.7, **options)[0], (logps / 10,), 1, ["rev"], eps=0.03)
    of_data = jax.grad(lambda r, p: call(name, logps, r, label, p, **options)[0].sum(), (0, 1))(ref_logps, 0.7)
    assert not any(np.any(g) for g in of_data)  # reference and point are data
    far = np.float32([-1e4, 1e4])
    value, slope = jax.value_and_grad(lambda x: call(name, x, 0 * far, np.array([1, 0]), 0.7, **options)[0].sum())(far)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_numbers_out_of_range_are_refused():
    cfg, _ = model("llama")
    for name, options, message in (
        ("kto", {"beta": 0.0}, "beta is 0.0"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight or undesirable_weight is -1.0"),
        ("apo_zero_unpaired", {"undesirable_weight": math.inf}, "is inf"),
        ("bco", {"beta": -0.1}, "beta is -0.1"),
        ("bco", {"desirable_weight": 1.0}, "takes .'beta'., not .'desirable_weight'."),
        ({"kto": 1.0, "sigmoid": 1.0}, {}, "'kto' is no term of a sum"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.make(cfg, name, **options)


def test_the_mean_over_a_batch_is_weighted_and_its_kl_is_not_negative():
    x, weights = np.float32([3, -1, 8, 100]), np.float32([1, 2, 0.5, 0])
    assert float(unpaired.mismatched_kl(x, weights)) == pytest.approx((3 - 2 + 4) / 3.5)
    assert float(unpaired.mismatched_kl(-x, weights)) == 0
    assert float(unpaired.mismatched_kl(x, 0 * weights)) == 0


def test_bcos_shift_is_half_the_sum_of_two_means_over_everything_seen():
    rng = np.random.default_rng(0)
    rewards, weights = rng.normal(1, 2, (4, 6)), rng.uniform(0, 2, (4, 6))
    label = rng.integers(0, 2, (4, 6))
    label[0] = 1  # at first nothing undesirable is known: the mean of what is
    seen = jnp.zeros((2, 2))
    assert float(unpaired.reward_shift(seen)) == 0
    for n in range(4):
        seen = unpaired.merge_means(seen, unpaired.reward_means(rewards[n], label[n], weights[n]))
        r, w, y = (x[: n + 1].reshape(-1) for x in (rewards, weights, label))
        means = [np.average(r[y == kind], weights=w[y == kind]) for kind in (0, 1) if (y == kind).any()]
        np.testing.assert_allclose(unpaired.reward_shift(seen), np.mean(means), rtol=1e-5)


# The objective: TRL's numbers


def to_rows(sequences):
    """TRL's arrays of sequences, [E, T] each, in our layout: an example's neighbours, padded to ROWS and TIME."""

    def rows(name):
        padded = [np.pad(x[name], [(0, 0), (0, TIME - x[name].shape[1])]) for x in sequences]
        return np.stack(padded, axis=1).reshape(-1, TIME)

    tokens, lengths = rows("input_ids"), rows("attention_mask").sum(axis=1).astype(np.int32)
    mask = rows("completion_mask").astype(bool)
    batch = {"tokens": tokens, "positions": positions(tokens), "mask": mask, "lengths": lengths}
    return batch | {"ends": lengths[:, None] - 1}


LEAVES = ("tokens", "positions", "mask", "segment_ids")


def run_forward(cfg, params, batch):
    batch = {name: np.asarray(batch[name]) for name in LEAVES if name in batch}
    return lambda cotangent: forward_and_pullback(cfg)(params, batch, cotangent)


def score_rows(cfg, params, batch):
    """Token log-probs of all rows, [R, T], by half a batch at a time where that has the shape of the other programs."""
    nothing = np.zeros((ROWS, TIME), np.float32)
    starts = range(0, len(batch["tokens"]), ROWS)
    parts = [{name: batch[name][at : at + ROWS] for name in LEAVES if name in batch} for at in starts]
    return np.concatenate([run_forward(cfg, params, part)(nothing)[0]["logps"] for part in parts])


def in_two_programs(objective, params, batch, monkeypatch, aux=None):
    """(loss, metrics, gradients, examples): the model's program apart from the loss, which needs no compilation.

    The model sees ROWS x TIME at a time, whether that is the whole batch or one sequence of each example.
    """
    nothing = np.zeros((ROWS, TIME), np.float32)
    seen = []

    def score(cfg, probe, part, *, want=("logps",)):
        assert part["tokens"].shape == (ROWS, TIME)
        seen.append(run_forward(cfg, params, part))
        stats = seen[-1](nothing)[0]
        return {name: stats[name] + probe if name == "logps" else stats[name] for name in want}

    with monkeypatch.context() as patch:
        patch.setattr(logprobs, "score", score)
        (loss, found), cotangent = jax.value_and_grad(objective, has_aux=True)(nothing, None, batch, aux or {}, None)
        gradients = seen[0](cotangent)[1]  # the second, where there is one, has none
        examples = objective.examples(nothing, None, batch)
    return jax.device_get((loss, found, gradients, examples))


def golden_batch(family, name):
    golden, a = case(family, name)
    kinds = ("", "KL_") if "in.KL_input_ids" in a else ("",)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = to_rows([{n: a[f"in.{kind}{n}"] for n in names} for kind in kinds])
    batch["label"] = np.repeat(a["in.label"], len(kinds))[:, None].astype(np.float32)
    return golden, a, batch


@pytest.mark.parametrize("family", FIRST_FAMILY)
@pytest.mark.parametrize("name", CASES)
def test_loss_metrics_and_gradients_equal_trl(name, family, monkeypatch):
    golden, a, batch = golden_batch(family, name)
    roles = ("ref", "policy") if golden["policy_and_ref_swapped"] else ("policy", "ref")
    (cfg, params), (_, ref_params) = (model(family, role) for role in roles)
    batch["ref_logps"] = score_rows(cfg, ref_params, batch)
    settings = golden["effective_config"]
    options = {n: settings[n] for n in ("beta", "desirable_weight", "undesirable_weight")}
    objective = objectives.make(cfg, settings["loss_type"], **options)
    assert objective.needs_mismatched == ("in.KL_input_ids" in a)
    loss, found, gradients, examples = in_two_programs(objective, params, batch, monkeypatch)
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    np.testing.assert_allclose(objective.total(examples), golden["loss"], **LOSS)
    np.testing.assert_allclose(examples["logps"], a["out.logps"], **SEQUENCE_LOGPS)
    np.testing.assert_allclose(examples["ref_logps"], a["out.ref_logps"], **SEQUENCE_LOGPS)
    np.testing.assert_allclose(examples["rewards"], a["out.rewards"], **REWARD)
    if objective.needs_mismatched:
        np.testing.assert_allclose(examples["mismatched"], a["out.KL_logps"] - a["out.ref_KL_logps"], **SEQUENCE_LOGPS)

    values = metrics.reduce(found)
    tolerance = {"logps": SEQUENCE_LOGPS, "rewards": REWARD}
    for key, want in golden["metrics"].items():
        if key != "num_tokens":  # counted by the step
            np.testing.assert_allclose(values[key], want, **tolerance.get(key.split("/")[0], LOSS), err_msg=key)
    assert_golden_gradients(gradients, golden, a, cfg)


def test_one_golden_case_has_a_kl_and_another_a_clamped_one():
    kls = [case("llama", name)[0]["metrics"]["kl"] for name in ("kto", "kto_swapped")]
    assert min(kls) == 0 and max(kls) > 0.1


# The objective on a model that is a table of log-probs: what may not matter

VOCAB = 7
BACKWARD = []  # shapes whose log-probs a gradient went through


@jax.custom_vjp
def look_up(table, tokens):
    return jax.nn.log_softmax(table)[tokens]


def look_up_backward(residuals, cotangent):
    BACKWARD.append(cotangent.shape)
    return jax.vjp(lambda table: jax.nn.log_softmax(table)[residuals[1]], residuals[0])[1](cotangent)[0], None


look_up.defvjp(lambda table, tokens: (look_up(table, tokens), (table, tokens)), look_up_backward)


def table_score(cfg, params, batch, *, want=("logps",)):
    from jaxalign.objectives import batches

    scored = jnp.where(batches.scored(batch), look_up(params["table"], batch["tokens"]), 0)
    return {name: scored * scale for name, scale in zip(want, (1.0, -2.0, 3.0), strict=False)}


@pytest.fixture
def of_table(monkeypatch):
    monkeypatch.setattr(logprobs, "score", table_score)
    return {"table": jnp.asarray(np.random.default_rng(5).normal(0, 1, VOCAB), jnp.float32)}


def random_batch(examples, width, *, seed=0):
    """Unpacked examples of different lengths, three tokens of prompt each."""
    rng = np.random.default_rng(seed)
    rows, time = examples * width, 11
    lengths = rng.integers(4, time + 1, rows).astype(np.int32)
    mask = (np.arange(time) >= 3) & (np.arange(time) < lengths[:, None])
    tokens = np.where(np.arange(time) < lengths[:, None], rng.integers(0, VOCAB, (rows, time)), 0).astype(np.int32)
    each = lambda x: np.repeat(np.asarray(x, np.float32), width)[:, None]  # noqa: E731
    batch = {
        "tokens": tokens,
        "positions": positions(tokens),
        "mask": mask,
        "lengths": lengths,
        "ends": lengths[:, None] - 1,
    }
    batch |= {"ref_logps": np.where(mask, rng.normal(-3, 1, mask.shape), 0).astype(np.float32)}
    batch |= {"label": each(np.arange(examples) % 3 != 1)}
    return batch | {"weight": each(rng.uniform(0.2, 2, examples))}


def of_batch(name, params, batch, aux=None, **options):
    """(loss, baseline, rewards) of a whole unpacked batch in float64, one example after another."""
    width = 2 if name == "kto" else 1
    table = np.float64(params["table"])
    table = table - np.log(np.exp(table).sum())
    x = [
        (table[t] - np.float64(r))[m].sum()
        for t, r, m in zip(*(batch[n] for n in ("tokens", "ref_logps", "mask")), strict=True)
    ]
    x = np.array(x).reshape(-1, width)
    label = batch["label"].reshape(-1, width)[:, 0] > 0
    weight = batch["weight"].reshape(-1, width)[:, 0]
    beta = options.get("beta", 0.1)
    point = 0.0
    if name == "kto":
        point = max(0.0, (weight * x[:, 1]).sum() / weight.sum())
    if name == "bco":
        sides = [(weight[label == y], beta * x[:, 0][label == y]) for y in (False, True)]
        before = np.zeros((2, 2)) if aux is None else np.float64(aux["reward_means"])
        totals = [(m * n + (w * r).sum(), n + w.sum()) for (m, n), (w, r) in zip(before, sides, strict=True)]
        point = np.mean([total / n for total, n in totals if n > 0])
    values = [one(name, each, 0, y, point, **options) for each, y in zip(x[:, 0], label, strict=True)]
    return (weight * values).sum() / weight.sum(), point, beta * x[:, 0]


@functools.cache
def program(objective, accumulation):
    if accumulation is None:
        return jax.jit(objective.examples)
    return jax.jit(step.make_gradients(objective, gradient_accumulation_steps=accumulation))


def gradients_of(objective, params, batch, aux=None, accumulation=1):
    batch = {n: jnp.asarray(x) for n, x in batch.items()}
    return jax.device_get(program(objective, accumulation)(params, None, batch, aux or NOTHING_SEEN))


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    scale = np.abs(want[2]["table"]).max()
    assert scale > 1e-4
    np.testing.assert_allclose(got[2]["table"], want[2]["table"], rtol=0, atol=1e-6 * max(scale, 1))
    ours, theirs = metrics.reduce(got[1]), metrics.reduce(want[1])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


SEEN, NOTHING_SEEN = ({"reward_means": np.float32(x)} for x in ([[-0.3, 4.0], [0.9, 2.5]], np.zeros((2, 2))))


@pytest.mark.parametrize("name", NAMES)
def test_every_split_of_a_batch_gives_the_loss_of_the_whole(name, of_table):
    objective = objectives.make(None, name)
    batch = random_batch(6, objective.width)
    whole = gradients_of(objective, of_table, batch, SEEN)
    loss, point, rewards = of_batch(name, of_table, batch, SEEN)
    np.testing.assert_allclose(whole[0], loss, rtol=1e-5)
    values, label = metrics.reduce(whole[1]), np.arange(6) % 3 != 1
    assert values["delta" if name == "bco" else "kl"] == pytest.approx(point, rel=1e-5)
    assert point != 0 or name == "apo_zero_unpaired"
    assert values["rewards/chosen"] == pytest.approx(
        rewards[label].mean(), rel=1e-5
    )  # weights are not in what is logged
    assert values["rewards/margins"] == pytest.approx(rewards[label].mean() - rewards[~label].mean(), rel=1e-5)
    # The second micro-batch has undesirable examples alone.
    assert_same(gradients_of(objective, of_table, batch, SEEN, accumulation=3), whole)


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_batch_a_single_example_and_fillers(name, of_table):
    objective = objectives.make(None, name)
    single = random_batch(1, objective.width)
    np.testing.assert_allclose(
        gradients_of(objective, of_table, single)[0], of_batch(name, of_table, single)[0], rtol=1e-5
    )
    batch = random_batch(3, objective.width)
    rows = {n: np.zeros((6 * objective.width, *x.shape[1:]), x.dtype) for n, x in batch.items()}
    rows["ends"] -= 1
    where = np.arange(6 * objective.width).reshape(6, -1)[[1, 2, 4]].reshape(-1)
    for n, x in batch.items():
        rows[n][where] = x
    odd = gradients_of(objective, of_table, rows, accumulation=3)
    np.testing.assert_allclose(odd[0], of_batch(name, of_table, batch)[0], rtol=1e-5)
    assert_same(gradients_of(objective, of_table, rows), odd)
    nothing = {n: np.zeros_like(x) for n, x in rows.items()}
    loss, _, gradients = gradients_of(objective, of_table, nothing)
    assert loss == 0 and not gradients["table"].any()


@pytest.mark.slow
def test_packed_rows_through_a_model_give_what_padded_ones_do(monkeypatch):
    _, _, batch = golden_batch("llama", "kto_swapped")
    cfg, params = model("llama", "ref")
    batch["ref_logps"] = score_rows(cfg, model("llama")[1], batch)
    objective = objectives.make(cfg, "kto")
    want = in_two_programs(objective, params, batch, monkeypatch)
    rows = packed({n: x for n, x in batch.items() if n != "ends"}, 2)
    monkeypatch.setitem(globals(), "ROWS", len(rows["tokens"]))
    monkeypatch.setitem(globals(), "TIME", rows["tokens"].shape[1])
    got = in_two_programs(objective, params, rows, monkeypatch)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(x[2]) for x in (got, want)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_mismatched_sequences_cost_no_backward_pass_and_only_they_the_first_pass(of_table):
    objective = objectives.make(None, "kto")
    batch = random_batch(6, 2)
    for accumulation in (1, 3):
        BACKWARD.clear()
        found = step.make_gradients(objective, gradient_accumulation_steps=accumulation)
        jax.eval_shape(found, of_table, None, batch, {})
        assert set(BACKWARD) == {(6 // accumulation, 11)}
    found = objective.first_pass(
        of_table, None, {**batch, "ref_logps": np.where(np.arange(12)[:, None] % 2, batch["ref_logps"], np.nan)}
    )
    assert np.isfinite(found["log_ratios"]).all()  # of no other row was anything read


def test_bco_keeps_its_running_means_through_steps_and_not_through_a_bad_one(of_table):
    objective = objectives.make(None, "bco")
    tx = optim.make_optimizer("sgd", schedule=optax.constant_schedule(0.3))
    state = step.init_state(of_table, tx, **objective.init_aux())
    train_step = jax.jit(step.make_train_step(objective, tx, gradient_accumulation_steps=2, nonfinite="skip"))
    aux = {"reward_means": np.zeros((2, 2))}
    for n in range(3):
        batch = random_batch(4, 1, seed=n)
        loss, point, rewards = of_batch("bco", state.params, batch, aux)
        label, weight = batch["label"][:, 0] > 0, np.float64(batch["weight"][:, 0])
        for kind in (0, 1):
            mean, total = aux["reward_means"][kind]
            w = np.where(label == kind, weight, 0)
            aux["reward_means"][kind] = (mean * total + (w * rewards).sum()) / (total + w.sum()), total + w.sum()
        state, found = train_step(state, None, batch)
        values = metrics.reduce(found)
        assert values["loss"] == pytest.approx(loss, rel=1e-4) and values["delta"] == pytest.approx(point, rel=1e-4)
        np.testing.assert_allclose(state.aux["reward_means"], aux["reward_means"], rtol=1e-4)
    bad = {**batch, "ref_logps": batch["ref_logps"] * np.nan}
    after, _ = train_step(state, None, bad)
    assert int(after.aux["skipped"]) == 1
    np.testing.assert_array_equal(after.aux["reward_means"], state.aux["reward_means"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "bco"])
def test_devices_and_accumulation_change_nothing_of_a_model(name):
    _, _, batch = golden_batch("llama", "kto_swapped")
    cfg, params = model("llama", "ref")
    batch["ref_logps"] = score_rows(cfg, model("llama")[1], batch)
    objective = objectives.make(cfg, name)
    if objective.width == 1:
        batch = {n: x[::2] for n, x in batch.items()}
    want = None
    for layout, accumulation in ((None, 1), (None, 4), ({"fsdp": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)):
        mesh = sharding.make_mesh(**layout) if layout else None
        with sharding.use_mesh(mesh):
            placed = sharding.place_batch(mesh, batch, len(batch["tokens"]))
            found = step.make_gradients(objective, gradient_accumulation_steps=accumulation)
            got = jax.device_get(jax.jit(found)(params, None, placed, {}))
        want = want or got
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        for ours, theirs in zip(*(jax.tree.leaves(x[2]) for x in (got, want)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
        ours, theirs = metrics.reduce(got[1]), metrics.reduce(want[1])
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
