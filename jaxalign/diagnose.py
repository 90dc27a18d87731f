"""What a run leaves beside the last good state when a loss or gradient was not finite."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxalign import paths

FOLDER = "nonfinite"


class NonFinite(RuntimeError):
    """A loss or gradient was not finite. Nothing was updated; the message names the report."""


def report(run: Any, state: Any, n: int, values: dict[str, float], folder: epath.Path) -> NonFinite:
    """Writes `<folder>/nonfinite/step_<n>.json` about the batch of step n, and returns the error to raise.

    The report holds the loss, rewards and log-probs of each example with its row number and text, and the gradient's
    norm in each weight, for stacked ones in each layer: computed anew from the state before the step, unchanged.

    Args:
      run: the `build.Run`.
      state: the TrainState, whose guard made every step from n on a no-op.
      n: the step, the first being 1.
      values: the metrics of the step.
      folder: the run's.
    """
    host_batch = run.source(n - 1, run.whole(state.params))
    batch = run.place(host_batch)
    if "ref_logps" not in host_batch and (ref_params := run.reference_of(state)) is not None:
        batch["ref_logps"] = run.score(ref_params, batch)
    examples = {name: np.asarray(x) for name, x in jax.device_get(run.examples(state.params, run.base, batch)).items()}
    norms = jax.jit(lambda *a: _norms(run.gradients(*a)[2]))(state.params, run.base, batch, state.aux)
    rows = []
    prepared = run.data.train
    for place, example in enumerate(run.slots_of(n - 1)):
        if example >= 0:
            numbers = {name: _number(x[place]) for name, x in examples.items() if name != "valid" and x.ndim == 1}
            rows.append({"row": prepared.source_row(int(example)), **numbers, "text": prepared.text(int(example))})
    content = {
        "step": n,
        "loss": _number(values["loss"]),
        "grad_norm": _number(values["grad_norm"]),
        "rows": rows,
        "gradient_norms": {name: [_number(x) for x in np.atleast_1d(norm)] for name, norm in norms.items()},
    }
    path = folder / FOLDER / f"step_{n}.json"
    if jax.process_index() == 0:
        paths.make_folder(path.parent)
        paths.replace(path, (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode())
    bad = [row["row"] for row in rows if isinstance(row["loss"], str)]
    return NonFinite(
        f"step {n}: loss {values['loss']}, gradient norm {values['grad_norm']}. No weight was changed; the state after "
        f"step {n - 1} is saved. {path} has each row's loss and text and the gradient's norm in each layer"
        f"{f' (rows with a bad loss: {bad})' if bad else ''}. Lower optim.learning_rate or optim.max_grad_norm, take "
        "the rows out, or pass over such batches by --config.optim.nonfinite=skip --resume=force"
    )


def _norms(gradients: Any) -> dict[str, jax.Array]:
    """L2 norm of each leaf's gradient, [L] for stacked ones."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.sqrt(
            jnp.square(g).sum(axis=tuple(range(1, g.ndim)) if path[0].key == "layers" else None)
        )
        for path, g in leaves
    }


def _number(x: Any) -> float | str:
    """A float for JSON; one that it has no number for as text."""
    return float(x) if np.isfinite(x) else str(float(x))
