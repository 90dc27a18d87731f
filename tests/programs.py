"""Ways to run an objective cheaply: the model's program apart from the loss, or a formula in the model's place."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from common import GRADIENT_NORM

from jaxalign import logprobs, models
from jaxalign.objectives import batches

SCORE = logprobs.score


@functools.cache
def forward_and_pullback(cfg):
    """(params, batch, cotangent of the log-probs, temperature) -> (token statistics, gradients); one program for all
    losses."""

    def both(params, batch, cotangent, temperature=1.0):
        def score(params):
            found = SCORE(cfg, params, batch, want=logprobs.STATISTICS, temperature=temperature)
            return found["logps"], found

        _, pullback, stats = jax.vjp(score, params, has_aux=True)
        return stats, pullback(cotangent)[0]

    return jax.jit(both)


def in_two_programs(objective, params, batch, monkeypatch):
    """What `in_one_program` gives, with the model's program apart from the loss, which then needs no compilation."""
    seen = {}
    both = forward_and_pullback(objective.cfg)
    nothing = np.zeros(batch["tokens"].shape, np.float32)

    def call(mask, cotangent):
        of_model = ("tokens", "positions", "segment_ids", "prefix_ids")
        rows = {**{name: batch[name] for name in of_model if name in batch}, "mask": mask}
        return both(params, rows, cotangent, seen["temperature"])

    def score(cfg, probe, batch, *, want=("logps",), temperature=1.0, differentiate=("logps",)):
        assert differentiate == ("logps",)
        seen.update(mask=np.asarray(batch["mask"]), temperature=np.float32(temperature))
        stats = call(seen["mask"], nothing)[0]
        return {name: stats[name] + probe if name == "logps" else stats[name] for name in want}

    with monkeypatch.context() as patch:
        patch.setattr(logprobs, "score", score)
        (loss, found), cotangent = jax.value_and_grad(objective, has_aux=True)(nothing, None, batch, {}, None)
        examples = objective.examples(nothing, None, batch)
    return jax.device_get((loss, found, call(seen["mask"], cotangent)[1], examples))


def hf_norms(gradients, cfg):
    """L2 norm of each gradient under Hugging Face's name; stacked leaves give one a layer."""
    norms = {}
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        keys = [k.key for k in path]
        last = "bias" if keys[-1] == "bias" else "weight"
        if keys[0] == "layers":
            for i in range(cfg.num_hidden_layers):
                norms[".".join(["model.layers", str(i), *keys[1:-1], last])] = float(np.linalg.norm(g[i]))
        else:
            head = [] if keys[0] == "lm_head" else ["model"]
            norms[".".join([*head, *keys[:-1], last])] = float(np.linalg.norm(g))
    return norms


def assert_golden_gradients(gradients, golden, a, cfg):
    """The norm of every gradient, and the entries that a golden case has."""
    norms = hf_norms(gradients, cfg)
    assert set(norms) == set(golden["grad_norms"])
    for key, want in golden["grad_norms"].items():
        np.testing.assert_allclose(norms[key], want, **GRADIENT_NORM, err_msg=key)
    entries = {
        "out.grad.model.norm.weight": gradients["norm"]["scale"],
        "out.grad.model.layers.0.input_layernorm.weight": gradients["layers"]["input_layernorm"]["scale"][0],
        "out.grad.model.layers.1.self_attn.k_proj.weight[:4]": (
            gradients["layers"]["self_attn"]["k_proj"]["kernel"][1].T[:4]
        ),
    }
    for key, got in entries.items():
        np.testing.assert_allclose(got, a[key], atol=2e-4 * np.abs(a[key]).max(), rtol=0, err_msg=key)


CFG = types.SimpleNamespace(num_labels=1)
"""The config of the formula below; losses of attributes take one with their number of heads."""

VOCAB = 40


def formula(monkeypatch):
    """In the model's place a formula of each token and the one before it, with the trainable tree {"kernel": [VOCAB]}.

    Log-probs and hidden states then know nothing of rows, so that a test may move examples about, and need no compile.
    """

    def score(cfg, params, batch, *, want=("logps",), **_):
        del cfg
        logps_RT = log_probs(params["kernel"], batch)
        found = {"logps": logps_RT, "entropy": -logps_RT, "mean_logit": logps_RT / 2, "correct": batch["tokens"] % 2}
        found["sum_p2"] = jnp.where(logps_RT < 0, 0.5 * jnp.exp(logps_RT), 0)
        return {name: found[name] for name in want}

    monkeypatch.setattr(logprobs, "score", score)
    monkeypatch.setattr(
        logprobs, "hidden", lambda cfg, params, batch: jnp.asarray(params["kernel"])[batch["tokens"]][..., None]
    )
    monkeypatch.setattr(models, "value", lambda cfg, params, h: jnp.tanh(h * jnp.arange(1, cfg.num_labels + 1)))


def log_probs(kernel, batch):
    """[R, T]: log-probs of the scored tokens, by formula."""
    logits_RT = jnp.asarray(kernel)[batch["tokens"]]
    before_RT = jnp.pad(logits_RT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(batches.scored(batch), -jax.nn.softplus(logits_RT + 0.3 * before_RT), 0)
