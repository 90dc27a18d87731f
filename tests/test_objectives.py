"""DPO through our own model, log-probs and losses: every number of TRL's cases, and what must not change them."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from common import (
    FAMILIES,
    FIRST_FAMILY,
    GRADIENT_NORM,
    LOSS,
    REWARD,
    SEQUENCE_LOGPS,
    case,
    model,
    packed,
    pair_batch,
    positions,
)
from programs import SCORE, assert_golden_gradients, hf_norms, in_two_programs

from jaxalign import losses, metrics, models, objectives, optim, reference, sharding, step

DPO = (
    "dpo_sigmoid", "dpo_ipo", "dpo_exo_pair", "dpo_nca_pair", "dpo_robust_ls0.1", "dpo_bco_pair", "dpo_sppo_hard",
    "dpo_aot", "dpo_aot_ls0.1", "dpo_apo_zero", "dpo_sft", "dpo_sigmoid_norm", "dpo_sigmoid_plus_sft", "dpo_mpo",
    "dpo_forward_kl", "dpo_js_divergence", "dpo_alpha_divergence", "dpo_ld_alpha_0.5", "dpo_precomputed_ref",
    "dpo_trunc_keep_start",
)  # fmt: skip
TRIPLES = ("tpo_sigmoid",)
REFERENCE_FREE = ("orpo_beta0.1", "cpo_sigmoid", "cpo_sigmoid_ls0.1", "cpo_no_nll", "cpo_simpo", "cpo_simpo_nll")


def objective_of(golden, cfg):
    """The objective of a golden case. TRL 1.16 ignores label_smoothing in its sigmoid loss; ours applies it."""
    settings = golden["effective_config"]
    if "ORPO" in golden["trainer"]:
        return objectives.pairwise(cfg, "orpo", beta=settings["beta"])
    if "CPO" in golden["trainer"]:
        kind = settings["loss_type"]
        options = {name: settings[name] for name in ("beta", "label_smoothing", "cpo_alpha")}
        if kind == "simpo":
            options["gamma_beta_ratio"] = settings["simpo_gamma"] / settings["beta"]
        return objectives.pairwise(cfg, {"sigmoid": "cpo", "simpo": "simpo"}[kind], **options)
    if "TPO" in golden["trainer"]:
        return objectives.make(
            cfg, "tpo", **{name: settings[name] for name in ("beta", "label_smoothing", "tpo_alpha")}
        )
    names = settings["loss_type"]
    terms = dict(zip(names, settings["loss_weights"] or [1.0] * len(names), strict=True))
    taken = {"beta"}.union(*(losses.LOSSES[name].options for name in names if name != "sft"))
    options = {name: x for name, x in settings.items() if name in taken}
    if "sigmoid" in names:
        options.pop("label_smoothing")
    return objectives.pairwise(cfg, terms, **options)


def free_batch(a):
    """TRL's batch of ORPO and CPO in our layout."""
    length = max(a[f"in.{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))

    def rows(key, fill):
        sides = [a[f"in.{side}_{key}"] for side in ("chosen", "rejected")]
        padded = [np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill) for x in sides]
        return np.stack(padded, axis=1).reshape(-1, length)

    tokens = rows("input_ids", 0)
    lengths = rows("attention_mask", 0).sum(axis=1).astype(np.int32)
    return {"tokens": tokens, "positions": positions(tokens), "mask": rows("labels", -100) != -100, "lengths": lengths}


def padded(batch):
    """With fillers and padding up to the largest golden batch, so that all of them share their programs."""
    rows, time = 24, 68
    return {name: np.pad(x, [(0, rows - len(x)), (0, time - x.shape[-1])][: x.ndim]) for name, x in batch.items()}


def in_one_program(objective, params, batch, monkeypatch):
    """(loss, metrics, gradients, examples)."""
    gradients_of = step.make_gradients(objective)
    both = jax.jit(lambda *args: (*gradients_of(*args, {}), objective.examples(*args)))
    return jax.device_get(both(params, None, batch))


@functools.cache
def score_of(cfg):
    return jax.jit(reference.make_score(cfg))


def scored(family, batch):
    cfg, params = model(family, "ref")
    return {**batch, "ref_logps": np.asarray(score_of(cfg)(params, batch))}


@pytest.mark.parametrize(
    ("name", "family", "compute"),
    [
        pytest.param(name, family, in_two_programs, marks=[] if family == "llama" else [pytest.mark.slow])
        for name in (*DPO, *REFERENCE_FREE, *TRIPLES)
        for family in FAMILIES
    ]
    + [("dpo_sigmoid_plus_sft", "llama", in_one_program), ("dpo_aot_ls0.1", "qwen2", in_one_program)]
    + [("orpo_beta0.1", "qwen3", in_one_program)],
)
def test_loss_metrics_and_gradients_equal_trl(name, family, compute, monkeypatch):
    golden, a = case(family, name)
    cfg, params = model(family)
    if name in REFERENCE_FREE:
        batch = padded(free_batch(a))
    else:
        batch = padded(pair_batch(a, 3)) if name in TRIPLES else scored(family, padded(pair_batch(a)))
    if name == "dpo_precomputed_ref":
        # The reference comes as sums; any split over tokens will do, as a loss sees sums.
        given = np.stack([a["in.ref_chosen_logps"], a["in.ref_rejected_logps"]], axis=1).reshape(-1)
        first = np.argmax(batch["mask"], axis=1)[: len(given)]
        batch["ref_logps"] = np.zeros_like(batch["ref_logps"])
        batch["ref_logps"][np.arange(len(first)), first] = given
    objective = objective_of(golden, cfg)
    assert objective.needs_reference == (name in DPO) and objective.couples == ("aot" in name)
    loss, found, gradients, examples = compute(objective, params, batch, monkeypatch)
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    np.testing.assert_allclose(objective.total(examples), golden["loss"], **LOSS)
    for side in () if name in TRIPLES else ("chosen", "rejected"):
        examples = {name: x[: len(a["out.rewards.chosen"])] for name, x in examples.items()}
        logps = a[f"out.avg_logps.{side}" if name.startswith("orpo") else f"out.logps.{side}"]
        np.testing.assert_allclose(examples[f"logps/{side}"], logps, **SEQUENCE_LOGPS)
        np.testing.assert_allclose(examples[f"rewards/{side}"], a[f"out.rewards.{side}"], **REWARD)
        if name in DPO:
            np.testing.assert_allclose(examples[f"ref_logps/{side}"], a[f"out.ref_logps.{side}"], **SEQUENCE_LOGPS)
    if golden.get("per_pair_loss_averages_to_loss", name.startswith("cpo")) and "sft" not in name:
        np.testing.assert_allclose(examples["loss"], a["out.per_pair_loss"], **LOSS)
    if name.startswith("orpo"):
        np.testing.assert_allclose(-examples["loss"], a["out.beta_times_logsigmoid_log_odds"], **LOSS)

    values = metrics.reduce(found)
    assert all(np.isfinite(x) for x in values.values())
    tolerance = {"logps": SEQUENCE_LOGPS, "rewards": REWARD}
    for key, want in golden["metrics"].items():
        kind = key.split("/")[0]
        if key == "num_tokens" or (kind == "logits" and name in REFERENCE_FREE):
            continue  # counted by the step; over padding
        if key == "nll_loss" and "nll_loss" not in values:
            assert want == 0  # it is not in the loss
            continue
        np.testing.assert_allclose(values[key], want, **tolerance.get(kind, LOSS), err_msg=key)

    assert_golden_gradients(gradients, golden, a, cfg)


# Loss and global gradient norm of TRL 1.16's TPOTrainer._compute_loss on the arrays and the model of tpo_sigmoid; its
# tpo_l_gamma is 0.6.
TPO = (
    ("tpo", {"beta": 0.1, "label_smoothing": 0.2, "tpo_alpha": 0.3}, 1.7027372121810913, 2.8116307258605957),
    ("tpo", {"beta": 0.1, "tpo_alpha": 0.0}, 1.0547138452529907, 3.467266798019409),
    ("tpo_hinge", {"beta": 0.1}, 3.439462184906006, 5.269750118255615),
    ("tpo_ipo", {"beta": 0.3, "tpo_alpha": 0.5}, 4.336711883544922, 13.529094696044922),
    ("tpo_l", {"beta": 2.0, "gamma_beta_ratio": 0.3, "label_smoothing": 0.1, "tpo_alpha": 0.7}, 2.6277904510498047,
     4.846238136291504),
)  # fmt: skip


@pytest.mark.parametrize(("name", "options", "loss", "norm"), TPO, ids=[f"{name}-{x}" for name, *_, x in TPO])
def test_the_other_losses_of_triples_equal_trl(name, options, loss, norm, monkeypatch):
    cfg, params = model("llama")
    batch = padded(pair_batch(case("llama", "tpo_sigmoid")[1], 3))
    objective = objectives.make(cfg, name, **options)
    assert objective.kind == "triples" and not objective.needs_reference
    value, _, gradients, examples = in_two_programs(objective, params, batch, monkeypatch)
    np.testing.assert_allclose(value, loss, **LOSS)
    np.testing.assert_allclose(objective.total(examples), loss, **LOSS)
    np.testing.assert_allclose(optax.tree.norm(gradients), norm, **GRADIENT_NORM)


PACKED = (
    ({"sigmoid": 1.0, "sft": 0.5}, {"ld_alpha": 0.4, "f_divergence_type": "js_divergence"}),
    ("ipo", {"use_weighting": True}),
    ({"aot": 1.0, "exo_pair": 0.5, "sft": 0.3}, {"ld_alpha": 0.4}),
    ("orpo", {}),
    ("cpo", {}),
    ("tpo_l", {"tpo_alpha": 0.5}),
)
QUICK = (PACKED[0], PACKED[3])


@pytest.mark.parametrize(
    ("terms", "options", "shared"),
    [
        # The model's part is one; test_weights.py has every loss by formula.
        pytest.param(*case, shared, marks=[] if case in QUICK else [pytest.mark.slow])
        for shared in (False, True)
        for case in PACKED
        if not (shared and case[0] == "orpo")  # its prompts are scored
    ],
    ids=str,
)
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_ones(terms, options, shared, monkeypatch):
    cfg, params = model("llama")
    objective = objectives.make(cfg, terms, **options)
    assert objective.shares_prompt == (terms != "orpo")
    name = "tpo_sigmoid" if objective.kind == "triples" else "dpo_sigmoid"
    batch = padded(pair_batch(case("llama", name)[1], objective.width))
    batch = scored("llama", batch) if objective.needs_reference else batch
    weights = np.random.default_rng(0).uniform(0.2, 2, len(batch["tokens"]) // objective.width).astype(np.float32)
    batch["weight"] = np.repeat(weights, objective.width)[:, None]
    rows = packed(batch, objective.width, shared=shared)
    assert objective.group(rows) == 1 and objective.group(batch) == objective.width
    want = in_two_programs(objective, params, batch, monkeypatch)
    got = in_two_programs(objective, params, rows, monkeypatch)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for gradient, expected in zip(*map(jax.tree.leaves, (got[2], want[2])), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    values, wanted = metrics.reduce(got[1]), metrics.reduce(want[1])
    assert values.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(values[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert got[3].keys() == want[3].keys()
    for key, value in want[3].items():
        np.testing.assert_allclose(got[3][key][:6], value[:6], rtol=1e-4, atol=1e-4, err_msg=key)
        assert not got[3][key][6:].any()


@pytest.mark.parametrize("family", FIRST_FAMILY)
def test_label_smoothing_is_applied_where_trl_ignores_it(family):
    golden, a = case(family, "dpo_sigmoid_ls0.1")
    cfg, params = model(family)
    batch = scored(family, pair_batch(a))
    plain = objectives.pairwise(cfg, "sigmoid", beta=0.1)
    smooth = objectives.pairwise(cfg, "sigmoid", beta=0.1, label_smoothing=0.1)
    examples = jax.device_get(jax.jit(plain.examples)(params, None, batch))
    np.testing.assert_allclose(plain.total(examples), golden["loss"], **LOSS)  # TRL's number: without smoothing
    margin = examples["rewards/chosen"] - examples["rewards/rejected"]
    want = np.mean(0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin)))
    assert abs(want - golden["loss"]) > 1e-4
    loss, _ = jax.jit(lambda p: smooth(p, None, batch, {}, None))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("family", FIRST_FAMILY)
def test_a_training_curve_equals_trls(family):
    """Six real steps: AdamW, decay, linear schedule from 0, clipping at 1, two accumulation steps."""
    golden, a = case(family, "dpo_train")
    cfg, params = model(family)
    config = golden["config"]
    batches = training_batches(family)
    schedule = optim.make_schedule(
        "linear", config["learning_rate"], steps=config["max_steps"], warmup_steps=config["warmup_steps"]
    )
    tx = optim.make_optimizer("adamw", schedule=schedule, weight_decay=config["weight_decay"], b1=0.9, b2=0.999)
    objective = objectives.pairwise(cfg, "sigmoid", beta=0.1)
    train_step = jax.jit(step.make_train_step(objective, tx, gradient_accumulation_steps=2, max_grad_norm=1.0))
    state, num_tokens = step.init_state(params, tx), 0
    for n, want in enumerate(golden["steps"]):
        state, found = train_step(state, None, batches[n % len(batches)])
        values = metrics.reduce(found)
        num_tokens += values["num_tokens"]
        assert float(schedule(n)) == pytest.approx(want["learning_rate"], rel=1e-6)
        assert num_tokens == want["num_tokens"]
        # Token means (entropy, logits) are TRL's means over micro-batches, ours are over the batch.
        for key in ("loss", "grad_norm", *(k for k in want if k.startswith(("rewards/", "logps/")))):
            atol = 2e-4 if "/" in key else 0
            np.testing.assert_allclose(values[key], want[key], rtol=2e-3, atol=atol, err_msg=f"step {n + 1} {key}")
    norms = hf_norms(jax.device_get(state.params), cfg)
    for key, want in golden["final_param_norms"].items():
        np.testing.assert_allclose(norms[key], want, rtol=1e-5, err_msg=key)
    np.testing.assert_allclose(state.params["norm"]["scale"], a["out.final.model.norm.weight"], rtol=1e-5)


def training_batches(family):
    """As the case's note says: an epoch is pairs 0 to 3 (two micro-batches), then 4 and 5 (one)."""
    _, a = case(family, "dpo_train")
    batch = scored(family, pair_batch(a))
    pairs = [slice(2 * i, 2 * i + 2) for i in range(6)]
    take = lambda chosen: {  # noqa: E731
        name: np.concatenate([x[pairs[i]] for i in chosen]) for name, x in batch.items()
    }
    filler = {name: np.zeros_like(x[:4]) for name, x in batch.items()}
    second = {name: np.concatenate([x, filler[name]]) for name, x in take((4, 5)).items()}
    return [take((0, 1, 2, 3)), second]


def test_a_moved_reference_equals_trls():
    for family in FAMILIES:
        golden, a = case(family, "dpo_sync_ref")
        cfg, policy = model(family)
        mixed = jax.device_get(reference.mix(policy, model(family, "ref")[1], 0.6))
        norms = hf_norms(mixed, cfg)
        for key, want in golden["param_norms_after"].items():
            np.testing.assert_allclose(norms[key], want, rtol=1e-5, err_msg=key)
        np.testing.assert_allclose(mixed["norm"]["scale"], a["out.synced.model.norm.weight"], rtol=1e-6)


def test_the_first_loss_is_ln_2_when_the_policy_is_its_reference():
    for family in FAMILIES:
        cfg, params = model(family)
        batch = pair_batch(case(family, "dpo_sigmoid")[1])
        batch["ref_logps"] = np.asarray(score_of(cfg)(params, batch))
        objective = objectives.pairwise(cfg, "sigmoid", beta=0.1)
        (loss, found), _ = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, None, batch, {}, None)
        assert abs(float(loss) - np.log(2)) < 1e-5
        assert metrics.reduce(found)["ref_logps_difference/max"] < 1e-4


def test_unknown_losses_and_options_that_no_loss_takes_are_refused():
    cfg, _ = model("llama")
    for terms, options, message in (
        ("sigmoidd", {}, "sigmoidd.*did you mean 'sigmoid'"),
        ("ipo", {"label_smoothing": 0.1}, "not .'label_smoothing'."),
        ("simpo", {"gamma_beta_ration": 0.1}, "did you mean 'gamma_beta_ratio'"),
        ("cpo", {"ld_alpha": 0.5}, "not .'ld_alpha'."),
        ("orpo", {"cpo_alpha": 0.5}, "not .'cpo_alpha'."),
        ("sigmoid", {"ld_alpha": 1.5}, "ld_alpha is 1.5, expected a weight in .0, 1."),
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing is 0"),
        ({"sigmoid": 1, "aot": 1}, {"use_weighting": True}, "use_weighting = True does not go with 'aot'"),
        ({"sigmoid": 1, "bco_pair": 1}, {"f_divergence_type": "forward_kl"}, "does not go with 'bco_pair', only with"),
        ({"sigmoid": 1, "simpo": 1}, {"ld_alpha": 0.5}, "ld_alpha = 0.5 does not go with 'simpo'"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.pairwise(cfg, terms, **options)
    # Off is no option, as a config that names all keys has them.
    objectives.pairwise(cfg, "cpo", cpo_alpha=None, label_smoothing=None)
    objectives.pairwise(
        cfg, {"sigmoid": 1, "bco_pair": 1, "aot": 1}, f_divergence_type="reverse_kl", use_weighting=False
    )


TERMS = (*losses.LOSSES, {"sigmoid": 1.0, "sft": 1.0}, {"aot": 0.3, "simpo": 1.0, "orpo": 0.2})


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_an_all_masked_pair_and_an_empty_side_give_finite_losses_and_gradients(terms, monkeypatch):
    cfg, params = model("llama")
    options = {} if isinstance(terms, dict) or "use_weighting" not in losses.LOSSES[terms].options else WEIGHTED
    objective = objectives.pairwise(cfg, terms, **options)
    width = objective.width
    batch = padded(pair_batch(case("llama", "tpo_sigmoid" if width == 3 else "dpo_sigmoid")[1], width))
    batch = scored("llama", batch) if objective.needs_reference else batch
    batch["mask"] = batch["mask"].copy()
    batch["mask"][:width] = False  # a filler, beside those at the end
    batch["mask"][width] = False  # an example whose chosen side is empty
    loss, found, gradients, examples = in_two_programs(objective, params, batch, monkeypatch)
    assert np.isfinite(loss) and np.isfinite(optax.tree.norm(gradients)) and optax.tree.norm(gradients) > 0
    assert objective.total(examples) == pytest.approx(float(loss), rel=1e-5)
    assert float(objective.denominators(batch)["pairs"]) == 5
    assert not any(examples[name][0] for name in examples)
    # Without that filler it is the same.
    rest = padded({name: x[width:] for name, x in batch.items()})
    less, without, _, _ = in_two_programs(objective, params, rest, monkeypatch)
    np.testing.assert_allclose(loss, less, rtol=1e-5)
    for name, value in metrics.reduce(without).items():
        np.testing.assert_allclose(metrics.reduce(found)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


WEIGHTED = {"use_weighting": True}


def test_pairs_are_weighted_by_how_likely_the_policy_gives_them(monkeypatch):
    """WPO's weights from the whole distribution in float64; they have no gradient, and the NLL of a sum has none."""
    cfg, params = model("llama")
    batch = scored("llama", padded(pair_batch(case("llama", "dpo_sigmoid")[1])))
    n = 6
    hidden, _ = models.apply(cfg, params, batch["tokens"][: 2 * n], batch["positions"][: 2 * n])
    logits = np.asarray(models.unembed(cfg, params, hidden), np.float64)[:, :-1]
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    of_token = np.take_along_axis(probabilities, batch["tokens"][: 2 * n, 1:, None], axis=-1)[..., 0]
    mask = batch["mask"][: 2 * n, 1:]
    aligned = np.log(of_token) - np.log(np.square(probabilities).sum(axis=-1))
    weights = np.exp([row[kept].mean() for row, kept in zip(aligned, mask, strict=True)]).reshape(-1, 2).prod(axis=1)
    plain, weighted = (
        in_two_programs(objectives.pairwise(cfg, {"ipo": 1.0, "sft": 0.5}, **on), params, batch, monkeypatch)
        for on in ({}, WEIGHTED)
    )
    assert weights.std() > 0.01
    of_pairs = plain[3]["loss"][:n]
    np.testing.assert_allclose(weighted[3]["loss"][:n], weights * of_pairs, rtol=1e-4)
    nll = plain[0] - of_pairs.mean()
    np.testing.assert_allclose(weighted[0], (weights * of_pairs).mean() + nll, rtol=1e-4)
    for name in ("rewards/chosen", "logps/rejected"):
        np.testing.assert_allclose(weighted[3][name], plain[3][name], rtol=1e-6)

    objective = objectives.pairwise(cfg, "sigmoid", **WEIGHTED)
    one = padded({name: x[:2] for name, x in batch.items()})
    alone = [in_two_programs(o, params, one, monkeypatch)[2] for o in (objective, objectives.pairwise(cfg, "sigmoid"))]
    for got, want in zip(*map(jax.tree.leaves, alone), strict=True):
        np.testing.assert_allclose(got, weights[0] * want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


def test_the_nll_of_orpo_is_that_of_prompt_and_response_and_has_the_metric(monkeypatch):
    cfg, params = model("qwen2")
    batch = free_batch(case("qwen2", "orpo_beta0.1")[1])
    logps = np.asarray(
        SCORE(cfg, params, {**batch, "mask": np.arange(batch["mask"].shape[1]) < batch["lengths"][:, None]})["logps"]
    )
    nll = -logps[0::2].sum() / (batch["lengths"][0::2] - 1).sum()
    _, found, _, _ = in_two_programs(objectives.pairwise(cfg, "orpo"), params, batch, monkeypatch)
    assert metrics.reduce(found)["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert "ref_logps_difference/max" not in found


def on_layout(objective, params, rows, *, layout=None, accumulation=1):
    """(loss, metrics, gradients) on the host."""
    mesh = sharding.make_mesh(**layout) if layout else None
    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(objective.cfg)))
        placed = sharding.place_batch(mesh, rows, len(rows["tokens"]))
        gradients_of = step.make_gradients(objective, gradient_accumulation_steps=accumulation)
        return jax.device_get(jax.jit(gradients_of)(params, None, placed, {}))


@pytest.mark.parametrize(
    ("terms", "options", "splits"),
    [
        ({"aot": 1.0, "sft": 0.3}, {"beta": 0.3, "ld_alpha": 0.4}, ((None, 2), (None, 4), ({"fsdp": 8}, 1))),
        pytest.param("aot_unpaired", {"beta": 0.3}, (({"data": 4, "tensor": 2}, 4),), marks=pytest.mark.slow),
        pytest.param("orpo", {}, (({"data": 2, "fsdp": 4}, 2),), marks=pytest.mark.slow),
    ],
    ids=["aot", "aot_unpaired", "orpo"],
)
def test_accumulation_fillers_and_devices_do_not_change_what_a_whole_batch_gives(terms, options, splits):
    cfg, params = model("llama")
    batch = scored("llama", pair_batch(case("llama", "dpo_aot")[1]))
    objective = objectives.pairwise(cfg, terms, **options)
    want = on_layout(objective, params, batch)
    # 10 pairs and 6 fillers between them: 32 rows.
    size = len(batch["tokens"])
    where = np.sort(np.random.default_rng(0).choice(16, size // 2, replace=False))
    where = np.stack([2 * where, 2 * where + 1], axis=1).reshape(-1)
    rows = {name: np.zeros((32, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    for name, x in batch.items():
        rows[name][where] = x
    for layout, accumulation in splits:
        loss, found, gradients = on_layout(objective, params, rows, layout=layout, accumulation=accumulation)
        np.testing.assert_allclose(loss, want[0], rtol=1e-5)
        for got, expected in zip(*map(jax.tree.leaves, (gradients, want[2])), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        ours, theirs = metrics.reduce(found), metrics.reduce(want[1])
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_loss_of_distributions_over_an_evaluation_is_that_of_one_batch(monkeypatch):
    cfg, params = model("llama")
    batch = scored("llama", padded(pair_batch(case("llama", "dpo_aot")[1])))
    objective = objectives.pairwise(cfg, {"aot": 1.0, "ipo": 0.01, "sft": 0.5})
    whole, _, _, _ = in_two_programs(objective, params, batch, monkeypatch)
    parts = [
        in_two_programs(objective, params, padded({name: x[rows] for name, x in batch.items()}), monkeypatch)[3]
        for rows in (slice(0, 12), slice(12, 20))
    ]
    examples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert objective.total(examples) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("family", FIRST_FAMILY)
def test_in_bfloat16_the_reference_is_scored_as_the_step_scores(family):
    """On CPU both programs round alike; DESIGN gives up to 3e-2 where they do not (GPU, TPU)."""
    cfg, params = model(family)
    cfg = dataclasses.replace(cfg, compute_dtype="bfloat16", remat="full")
    batch = pair_batch(case(family, "dpo_sigmoid")[1])
    frozen = jax.jit(functools.partial(reference.frozen_copy, cfg))(params)
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16", "float32"}  # norm scales stay float32
    batch["ref_logps"] = np.asarray(score_of(cfg)(frozen, batch))
    objective = objectives.pairwise(cfg, "sigmoid")
    loss, found, _ = jax.jit(step.make_gradients(objective))(params, None, batch, {})
    assert abs(float(loss) - np.log(2)) < 1e-5
    assert metrics.reduce(found)["ref_logps_difference/max"] < 1e-4
