"""GRPO and its family through our own model: every number of TRL's cases, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FAMILIES, FIRST_FAMILY, LAYOUTS, LOSS, SEQUENCE_LOGPS, case, model, packed, positions
from programs import CFG, SCORE, assert_golden_gradients, forward_and_pullback, hf_norms, in_two_programs

from jaxalign import logprobs, metrics, models, objectives, optim, sharding, step

LOSSES = (
    "bnpo", "bnpo_beta", "bnpo_ga2", "cispo", "cispo_beta", "dapo", "dapo_beta", "dapo_beta_nobias", "dapo_eps_high",
    "dapo_ga2", "dapo_is_sequence_mask", "dapo_is_token_truncate", "dapo_mask_truncated", "dapo_onpolicy",
    "dapo_temperature", "dapo_tool_mask", "dr_grpo", "grpo", "grpo_beta", "grpo_delta", "grpo_ga2", "grpo_onpolicy",
    "gspo", "luspo_beta", "sapo", "sapo_beta", "vespo_beta",
)  # fmt: skip


def objective_of(golden, cfg):
    """The objective of a golden case."""
    settings = golden["effective_config"]
    name = "rloo" if "RLOO" in golden["trainer"] else settings["loss_type"]
    given = {f"importance_sampling_{key}": settings.get(f"vllm_importance_sampling_{key}", settings.get(key)) for key in
             ("mode", "clip_min", "clip_max")}  # fmt: skip
    given |= {key: settings[key] for key in objectives.options_of(name) if key in settings}
    given["importance_sampling_correction"] = "_is_" in golden["case"]
    if not given["importance_sampling_correction"]:
        given = {key: x for key, x in given.items() if key not in ("importance_sampling_mode",)}
    options = {key: settings[key] for key in ("temperature", "max_completion_length")}
    return objectives.make(cfg, name, **given, **options)


def batch_of(a):
    """TRL's batch, prompts padded left and completions right, in our layout: padded right."""
    prompts, completions = a["in.prompt_mask"].astype(bool), whole(a)
    length = prompts.shape[1] + completions.shape[1]
    batch = {name: np.zeros((8, length), dtype) for name, dtype in (("tokens", np.int32), ("mask", bool))}
    batch["lengths"] = (prompts.sum(axis=1) + completions.sum(axis=1)).astype(np.int32)
    counted = completions & a.get("in.tool_mask", np.ones_like(completions)).astype(bool)
    leaves = {"old_logps": "in.old_per_token_logps", "ref_logps": "in.ref_per_token_logps",
              "sampling_logps": "in.sampling_per_token_logps"}  # fmt: skip
    leaves = {name: key for name, key in leaves.items() if key in a}
    batch |= {name: np.zeros((8, length), np.float32) for name in leaves}
    for row in range(8):
        start, stop = prompts[row].sum(), batch["lengths"][row]
        batch["tokens"][row, :start] = a["in.prompt_ids"][row, prompts[row]]
        batch["tokens"][row, start:stop] = a["in.completion_ids"][row, completions[row]]
        batch["mask"][row, start:stop] = counted[row, completions[row]]
        for name, key in leaves.items():
            batch[name][row, start:stop] = a[key][row, completions[row]]
    batch["positions"] = positions(batch["tokens"])
    batch["advantages"] = a["in.advantages"][:, None]
    batch["truncated"] = (a["in.completion_mask"].sum(axis=1, keepdims=True) == 0).astype(np.float32)
    if "in.old_logps" in a:  # of sequences: any split over tokens will do, as a loss sees sums
        batch["old_logps"] = np.zeros((8, length), np.float32)
        batch["old_logps"][np.arange(8), batch["mask"].argmax(axis=1)] = a["in.old_logps"]
    return batch


def whole(a):
    """The completions' mask; TRL has none left where it leaves truncated ones out: their last token is no padding."""
    found = a["in.completion_mask"].astype(bool)
    if found.any(axis=1).all():
        return found
    length = found.shape[1] - (a["in.completion_ids"][:, ::-1] != 0).argmax(axis=1)
    return np.arange(found.shape[1]) < length[:, None]


def of_completions(x_RT, a):
    """Values of our rows in TRL's layout of completions, 0 elsewhere."""
    starts, mask = a["in.prompt_mask"].sum(axis=1), a["in.completion_mask"].astype(bool)
    rows = [np.asarray(x)[start : start + mask.shape[1]] for x, start in zip(x_RT, starts, strict=True)]
    rows = np.stack([np.pad(row, (0, mask.shape[1] - len(row))) for row in rows])
    return np.where(mask, rows, 0)


def assert_metrics(found, golden):
    values = metrics.reduce(found)
    others = ("num_tokens", "completions/", "rewards/", "reward", "frac_reward_zero_std")
    wanted = {key: x for key, x in golden["metrics"].items() if not key.startswith(others)}
    assert wanted
    for key, want in wanted.items():
        np.testing.assert_allclose(values[key], want, **LOSS, err_msg=key)
    return values


NAMES = (*(f"grpo_loss_{name}" for name in LOSSES), "rloo_loss")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=[] if family == "llama" else [pytest.mark.slow])
        for name in NAMES
        for family in FAMILIES
    ],
)
def test_loss_metrics_and_gradients_equal_trl(name, family, monkeypatch):
    golden, a = case(family, name)
    cfg, params = model(family)
    objective, batch = objective_of(golden, cfg), batch_of(a)
    assert objective.needs_reference == ("ref_logps" in batch) and not objective.couples
    if name.endswith("bnpo_ga2"):  # TRL divides by the tokens of a micro-batch: as if the other's weighed more
        tokens = batch["mask"].reshape(2, 4, -1).sum(axis=(1, 2))
        batch["weight"] = np.repeat(1000 / tokens, 4)[:, None].astype(np.float32)
    loss, found, gradients, examples = in_two_programs(objective, params, batch, monkeypatch)
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    np.testing.assert_allclose(objective.total(examples), golden["loss"], **LOSS)
    assert_golden_gradients(gradients, golden, a, cfg)
    if name.endswith("ga2"):
        return  # the metrics are those of the last micro-batch
    values = assert_metrics(found, golden)
    if "out.per_token_logps" in a:
        counted = a["in.completion_mask"] * a.get("in.tool_mask", 1)
        for key in ("logps", "entropy"):
            sums = (a[f"out.per_token_{key}"] * counted).sum(axis=1)
            np.testing.assert_allclose(examples[key], sums, **SEQUENCE_LOGPS)
    if "sampling_logps" in batch:
        ratio = a["in.importance_sampling_ratio"]
        ratio = ratio[a["in.completion_mask"] > 0] if ratio.shape[1] > 1 else ratio
        for key, want in (("min", ratio.min()), ("mean", ratio.mean()), ("max", ratio.max())):
            np.testing.assert_allclose(values[f"sampling/importance_sampling_ratio/{key}"], want, **LOSS)
        difference = np.abs(a["in.old_per_token_logps"] - a["in.sampling_per_token_logps"])[a["in.completion_mask"] > 0]
        np.testing.assert_allclose(values["sampling/sampling_logp_difference/mean"], difference.mean(), **LOSS)
        np.testing.assert_allclose(values["sampling/sampling_logp_difference/max"], difference.max(), **LOSS)


@pytest.mark.parametrize("family", FIRST_FAMILY)
def test_a_training_curve_equals_trls(family):
    """Four real steps, two on each generation batch: the second one's ratios are no longer 1."""
    golden, a = case(family, "grpo_train")
    cfg, params = model(family)
    settings = golden["effective_config"]
    schedule = optim.make_schedule(
        "linear", settings["learning_rate"], steps=settings["max_steps"], warmup_steps=settings["warmup_steps"]
    )
    tx = optim.make_optimizer("adamw", schedule=schedule, weight_decay=settings["weight_decay"], b1=0.9, b2=0.999)
    objective, batch = objective_of(golden, cfg), batch_of(a)
    score = jax.jit(lambda params: SCORE(cfg, params, batch)["logps"])
    batch["ref_logps"] = np.asarray(score(model(family, "ref")[1]))
    train_step = jax.jit(step.make_train_step(objective, tx, max_grad_norm=settings["max_grad_norm"]))
    state = step.init_state(params, tx)
    for n, want in enumerate(golden["steps"]):
        if n % settings["num_iterations"] == 0:
            old_logps = np.asarray(score(state.params))
        state, found = train_step(state, None, {**batch, "old_logps": old_logps})
        values = metrics.reduce(found)
        for key in ("loss", "grad_norm", "kl", "entropy", *(key for key in want if key.startswith("clip_ratio/"))):
            np.testing.assert_allclose(values[key], want[key], rtol=2e-3, atol=1e-5, err_msg=f"step {n + 1} {key}")
    norms = hf_norms(jax.device_get(state.params), cfg)
    for key, want in golden["final_param_norms"].items():
        np.testing.assert_allclose(norms[key], want, rtol=1e-5, err_msg=key)
    np.testing.assert_allclose(state.params["norm"]["scale"], a["out.final.model.norm.weight"], rtol=1e-5)


def sampled(seed, *, drop=False, rows=6, prompt=2, time=9):
    """Completions of random lengths whose log-probs and entropies are the trainable tree themselves."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, time + 1, rows)
    mask = np.arange(time) < lengths[:, None]
    logps, entropy = -rng.gamma(1, 1, (rows, time)), rng.gamma(1, 1, (rows, time))
    old = logps + rng.normal(0, 0.4, (rows, time))
    leaves = {"old_logps": old, "ref_logps": logps + rng.normal(0, 0.3, (rows, time))}
    leaves["sampling_logps"] = old + rng.normal(0, 0.2, (rows, time))
    place = lambda x: np.pad(x.astype(np.float32), ((0, 0), (prompt, 0)))  # noqa: E731
    batch = {name: place(x) for name, x in leaves.items()}
    batch |= {"tokens": np.zeros((rows, prompt + time), np.int32), "mask": place(mask).astype(bool)}
    batch |= {"positions": positions(batch["tokens"]), "lengths": (lengths + prompt).astype(np.int32)}
    batch["advantages"] = rng.normal(0, 1, (rows, 1)).astype(np.float32)
    batch["truncated"] = np.zeros((rows, 1), np.float32)
    batch["truncated"][1] = drop
    return {"logps": place(logps), "entropy": place(entropy)}, batch


def tokens_are_parameters(monkeypatch):
    """Let the trainable tree be the statistics of the tokens."""

    def score(cfg, params, batch, *, want, temperature, differentiate=("logps",)):
        del cfg, temperature
        kept = {name: params[name] if name in differentiate else jax.lax.stop_gradient(params[name]) for name in want}
        return {name: jnp.where(batch["mask"], x, 0) for name, x in kept.items()}

    monkeypatch.setattr(logprobs, "score", score)


# Loss and norms of its gradients (by log-probs, and by entropies where they have one) of TRL 1.16's
# GRPOTrainer._compute_loss and GMPOTrainer._compute_loss on `sampled(seed, drop=)`, the seed being the case's number;
# max_completion_length 9.
TRL = (
    (
        "grpo",
        {"top_entropy_quantile": 0.3, "entropy_coef": 0.1, "beta": 0.1},
        True,
        -0.407973051,
        0.143700674,
        0.0408248305,
    ),
    (
        "bnpo",
        {"off_policy_mask_threshold": 0.05, "importance_sampling_level": "sequence", "epsilon": 0.1},
        False,
        0.291035682,
        0.177484363,
        None,
    ),
    (
        "dr_grpo",
        {
            "top_entropy_quantile": 0.5,
            "importance_sampling_correction": True,
            "importance_sampling_mode": "token_mask",
            "importance_sampling_clip_max": 1.2,
            "importance_sampling_clip_min": 0.9,
        },
        True,
        -0.0177268293,
        0.0232384223,
        None,
    ),
    (
        "dapo",
        {
            "importance_sampling_correction": True,
            "importance_sampling_mode": "sequence_truncate",
            "importance_sampling_clip_max": 1.1,
            "beta": 0.2,
            "use_bias_correction_kl": False,
        },
        False,
        -0.254880577,
        0.0543228015,
        None,
    ),
    (
        "cispo",
        {"epsilon_high": 1.2, "top_entropy_quantile": 0.0, "entropy_coef": -0.05},
        False,
        0.207386643,
        0.00265210751,
        0.0500000007,
    ),
    (
        "luspo",
        {"epsilon": 0.05, "delta": 1.2, "beta": 0.1, "importance_sampling_level": "sequence"},
        True,
        -1.063797,
        0.496935368,
        None,
    ),
    (
        "sapo",
        {"off_policy_mask_threshold": 0.0, "importance_sampling_level": "sequence"},
        True,
        -0.656104028,
        0.0971518233,
        None,
    ),
    (
        "vespo",
        {
            "importance_sampling_correction": True,
            "importance_sampling_mode": "token_mask",
            "importance_sampling_clip_max": 1.3,
            "beta": 0.1,
        },
        False,
        -0.0121031916,
        0.00595237687,
        None,
    ),
    (
        "vespo",
        {
            "importance_sampling_correction": True,
            "importance_sampling_mode": "token_truncate",
            "importance_sampling_clip_max": 1.1,
        },
        True,
        0.585266054,
        0.206723884,
        None,
    ),
    ("gmpo", {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.1}, False, 0.173549339, 0.151051417, None),
)


@pytest.mark.parametrize("number", range(len(TRL)), ids=lambda number: f"{TRL[number][0]}-{number}")
def test_options_that_no_golden_case_has_equal_trl(number, monkeypatch):
    tokens_are_parameters(monkeypatch)
    name, options, drop, want, norm, of_entropy = TRL[number]
    params, batch = sampled(number, drop=drop)
    if "off_policy_mask_threshold" in options:
        del batch["sampling_logps"]
    objective = objectives.make(CFG, name, mask_truncated_completions=True, max_completion_length=9, **options)
    (loss, _), gradients = jax.value_and_grad(objective, has_aux=True)(params, None, batch, {}, None)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-7)
    if "off_policy_mask_threshold" in options:  # what is not known is taken from the old policy, as if nothing were
        unknown = {**batch, "sampling_logps": np.full(batch["mask"].shape, np.nan, np.float32)}
        np.testing.assert_array_equal(objective(params, None, unknown, {}, None)[0], loss)
    assert objective.total(objective.examples(params, None, batch)) == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradients["logps"]), norm, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradients["entropy"]), of_entropy or 0, rtol=1e-5)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 7))])
def test_a_split_knows_of_the_whole_batch_what_ties_its_tokens_together(number, monkeypatch):
    tokens_are_parameters(monkeypatch)
    name, options, drop, want, _, _ = TRL[number]
    params, batch = sampled(number, drop=drop)
    objective = objectives.make(CFG, name, mask_truncated_completions=True, max_completion_length=9, **options)
    gradients = jax.grad(lambda params: objective(params, None, batch, {}, None)[0])(params)
    rows = {key: np.concatenate([x, np.zeros_like(x[:2])]) for key, x in batch.items()}
    score = logprobs.score  # the parameters are rows too: each micro-batch takes its own by their number
    rows["row"] = np.arange(8, dtype=np.int32)[:, None]
    tree = {key: np.concatenate([x, np.zeros_like(x[:2])]) for key, x in params.items()}

    def of_rows(cfg, params, batch, **keywords):
        mine = {key: jnp.asarray(x)[batch["row"][:, 0]] for key, x in params.items()}
        return score(cfg, mine, batch, **keywords)

    monkeypatch.setattr(logprobs, "score", of_rows)
    split, _, of_split = step.make_gradients(objective, gradient_accumulation_steps=4)(tree, None, rows, {})
    np.testing.assert_allclose(split, want, rtol=1e-5, atol=1e-7)
    for key, x in gradients.items():
        np.testing.assert_allclose(of_split[key][:6], x, rtol=1e-5, atol=1e-7)


FILTERED = (
    "dapo",
    {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, "beta": 0.1, "mask_truncated_completions": True},
)


def everything():
    """A golden batch with all leaves there are."""
    batch = batch_of(case("llama", "grpo_loss_dapo_beta")[1])
    rng = np.random.default_rng(0)
    batch["sampling_logps"] = batch["old_logps"] + rng.normal(0, 0.1, batch["mask"].shape).astype(np.float32)
    batch["truncated"][3] = 1
    batch["weight"] = rng.uniform(0.2, 2, (8, 1)).astype(np.float32)
    return batch


def on_layout(objective, params, rows, *, layout=None, accumulation=1):
    """(loss, metrics, gradients) on the host."""
    mesh = sharding.make_mesh(**layout) if layout else None
    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(objective.cfg)))
        placed = sharding.place_batch(mesh, rows, len(rows["tokens"]))
        gradients_of = step.make_gradients(objective, gradient_accumulation_steps=accumulation)
        return jax.device_get(jax.jit(gradients_of)(params, None, placed, {}))


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (got[2], want[2])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    ours, theirs = metrics.reduce(got[1]), metrics.reduce(want[1])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [(layout, 1 + index % 2) for index, layout in enumerate(LAYOUTS)] + [(None, 4)],
    ids=str,
)
@pytest.mark.slow
def test_accumulation_fillers_and_devices_do_not_change_what_a_whole_batch_gives(layout, accumulation):
    cfg, params = model("llama")
    objective = objectives.make(cfg, FILTERED[0], **FILTERED[1])
    assert objective.couples
    batch = everything()
    want = unsplit(objective)
    where = np.sort(np.random.default_rng(0).choice(32, 8, replace=False))
    rows = {name: np.zeros((32, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    for name, x in batch.items():
        rows[name][where] = x
    rows = {name: np.pad(x, ((0, 0), (0, 11))) if x.shape[1:] == (53,) else x for name, x in rows.items()}
    assert_same(on_layout(objective, params, rows, layout=layout, accumulation=accumulation), want)


@functools.cache
def unsplit(objective):
    return on_layout(objective, model("llama")[1], everything())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gspo", {"beta": 0.1, "importance_sampling_correction": True, "off_policy_mask_threshold": 0.1}),
        ("vespo", {"mask_truncated_completions": True, "importance_sampling_correction": True}),
        ("gmpo", {"beta": 0.1}),
        ("rloo", {}),
        ("cispo", {"top_entropy_quantile": 0.3}),
        ("gspo", {"importance_sampling_level": "sequence_token"}),
    ],
    ids=str,
)
@pytest.mark.slow  # test_weights.py has every loss by formula
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_ones(name, options, monkeypatch):
    cfg, params = model("llama")
    objective, batch = objectives.make(cfg, name, **options), everything()
    rows = packed(batch, 1, per_row=3)
    assert objective.group(rows) == 1 and rows["advantages"].shape == (4, 3)
    want = in_two_programs(objective, params, batch, monkeypatch)
    got = in_two_programs(objective, params, rows, monkeypatch)
    assert_same(got, want)
    for key, value in want[3].items():
        np.testing.assert_allclose(got[3][key][:8], value, rtol=1e-4, atol=1e-4, err_msg=key)
        assert not got[3][key][8:].any()


def test_advantages_of_tokens_are_taken_one_by_one(monkeypatch):
    tokens_are_parameters(monkeypatch)
    params, batch = sampled(3)
    of_tokens = np.random.default_rng(4).normal(0, 1, batch["mask"].shape).astype(np.float32)
    objective = objectives.make(CFG, "reinforce_pp", beta=0.1)
    assert objective.needs_reference and objective.kl_in_reward and objective.estimator == "reinforce_pp"
    loss, found = objective(params, None, {**batch, "advantages": of_tokens}, {}, None)
    mask = batch["mask"]
    ratio = np.exp(params["logps"] - batch["old_logps"])[mask].astype(np.float64)
    a = of_tokens[mask]
    want = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    kl = (batch["old_logps"] - batch["ref_logps"])[mask].mean()
    assert metrics.reduce(found)["kl"] == pytest.approx(kl, rel=1e-5)


def test_the_kl_of_rewards_is_not_in_the_loss(monkeypatch):
    tokens_are_parameters(monkeypatch)
    params, batch = sampled(5)
    for name in ("rloo", "reinforce", "reinforce_pp"):
        with_, without = (objectives.make(CFG, name, beta=beta)(params, None, batch, {}, None) for beta in (0.3, 0.0))
        assert float(with_[0]) == float(without[0]) and "kl" in with_[1] and "kl" not in without[1]
    assert objectives.make(CFG, "rloo").beta == 0.05 and objectives.make(CFG, "grpo").beta == 0
    assert objectives.needs_reference(["rloo"]) and not objectives.needs_reference(["rloo"], 0.0)
    assert objectives.needs_reference(["grpo"], 0.1) and not objectives.needs_reference(["grpo"])


def test_reinforce_is_the_gradient_of_the_log_prob_of_a_completion(monkeypatch):
    tokens_are_parameters(monkeypatch)
    params, batch = sampled(6)
    slope = jax.grad(lambda params: objectives.make(CFG, "reinforce")(params, None, batch, {}, None)[0])(params)
    np.testing.assert_allclose(slope["logps"], np.where(batch["mask"], -batch["advantages"] / 6, 0), rtol=1e-6)


def test_a_completion_without_an_end_counts_nowhere_but_in_the_number_of_completions(monkeypatch):
    tokens_are_parameters(monkeypatch)
    params, batch = sampled(7, drop=True)
    for name, share in (("grpo", 5 / 6), ("dapo", 1.0), ("dr_grpo", 5 / 6), ("rloo", 5 / 6)):
        objective = objectives.make(CFG, name, mask_truncated_completions=True)
        loss, found = objective(params, None, batch, {}, None)
        rest = {key: np.delete(x, 1, axis=0) for key, x in batch.items()}
        tree = {key: np.delete(x, 1, axis=0) for key, x in params.items()}
        less, without = objective(tree, None, rest, {}, None)
        np.testing.assert_allclose(loss, share * less, rtol=1e-5, err_msg=name)
        assert metrics.reduce(found) == pytest.approx(metrics.reduce(without), rel=1e-5)
        # A sequence where nothing counts gives numbers, too.
        nothing, found = objective(params, None, {**batch, "truncated": np.ones_like(batch["truncated"])}, {}, None)
        assert float(nothing) == 0 and "entropy" not in metrics.reduce(found)


def test_the_reference_is_itself_at_the_same_temperature(monkeypatch):
    cfg, params = model("llama")
    batch = batch_of(case("llama", "grpo_loss_dapo_onpolicy")[1])
    rows = {name: batch[name] for name in ("tokens", "positions", "mask")}
    at = {
        t: forward_and_pullback(cfg)(params, rows, np.zeros(rows["mask"].shape, np.float32), np.float32(t))[0]["logps"]
        for t in (0.5, 1.0)
    }
    objective = objectives.make(cfg, "grpo", beta=0.1, temperature=0.5)
    for t, ref_logps in at.items():
        batch["ref_logps"] = np.asarray(ref_logps)
        _, found, _, _ = in_two_programs(objective, params, batch, monkeypatch)
        assert (metrics.reduce(found)["ref_logps_difference/max"] < 1e-5) == (t == 0.5)


def test_options_out_of_range_are_refused():
    for name, options, message in (
        ("grpo", {"epsilon": 0.0}, "epsilon is 0.0, expected a number above 0"),
        ("grpo", {"beta": -0.1}, "beta is -0.1, expected a number at least 0"),
        ("grpo", {"top_entropy_quantile": 1.2}, "top_entropy_quantile is 1.2, expected a number in .0, 1."),
        ("gspo", {"importance_sampling_level": "row"}, "expected one of token, sequence, sequence_token"),
        ("dapo", {"importance_sampling_mode": "clip"}, "expected one of token_truncate"),
        ("vespo", {"importance_sampling_mode": "sequence_mask"}, "vespo takes token_truncate or token_mask"),
        ("vespo", {"importance_sampling_level": "token"}, "not .'importance_sampling_level'."),
        ("rloo", {"top_entropy_quantile": 0.2}, "not .'top_entropy_quantile'."),
        ("cispo", {"epsilon": 0.2}, "not .'epsilon'., did you mean|not .'epsilon'."),
        ("grpo", {"temperature": 0.0}, "temperature is 0.0, expected one above 0"),
        ({"grpo": 1.0, "sft": 0.1}, {}, "'grpo' is no term of a sum"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.make(CFG, name, **options)
