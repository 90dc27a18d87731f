"""Losses: pure functions on arrays, one a paper, that return unreduced values; and the table of those of pairs."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.losses.absolute import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from jaxalign.losses.preference import discopop, dpo, exo_pair, hinge, ipo, robust, sigmoid_norm
from jaxalign.losses.ratios import PairLosses
from jaxalign.losses.reference_free import cpo, cpo_hinge, cpo_ipo, orpo, simpo
from jaxalign.losses.transport import aot, aot_unpaired

__all__ = [
    "LOG_PROB_OPTIONS", "LOSSES", "PairLosses", "Preference", "aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair",
    "check_terms", "cpo", "cpo_hinge", "cpo_ipo", "discopop", "dpo", "exo_pair", "hinge", "ipo", "nca_pair", "orpo",
    "robust", "sigmoid_norm", "simpo", "sppo_hard",
]  # fmt: skip

LOG_PROB_OPTIONS: dict[str, Any] = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
"""Options of what a pair's log-probs mean, with the values that switch them off: all losses of a sum must take them."""


@dataclass(frozen=True)
class Preference:
    """A loss of pairs as `loss.name` selects it; what it takes is read from its signature.

    Attributes:
      function: the loss.
      nll: weight of the chosen responses' token NLL, added to the loss; the option `cpo_alpha` sets another.
      nll_of_rows: the NLL is that of the whole chosen rows, prompt and response, with this fixed weight.
    """

    function: Callable[..., PairLosses]
    nll: float | None = None
    nll_of_rows: float = 0.0

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Those of the function."""
        return inspect.signature(self.function).parameters

    @property
    def takes_tokens(self) -> bool:
        """Whether `chosen_tokens` and `rejected_tokens` [P] are to be given."""
        return "chosen_tokens" in self.parameters

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs under a reference are to be given."""
        return "ref_chosen" in self.parameters

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the batch; then `valid` [P] is to be given."""
        return "valid" in self.parameters

    @property
    def options(self) -> dict[str, Any]:
        """The options that a config may set, with their defaults: the function's and those that the objective reads."""
        options = {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if parameter.default is not inspect.Parameter.empty and name != "valid"
        }
        if self.nll is not None:
            options["cpo_alpha"] = self.nll
        if self.needs_reference:
            options["ld_alpha"] = None
            if not self.couples:  # sorted, a pair's loss has lost its weight
                options["use_weighting"] = False
        return options

    def keywords(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `options` that the function takes."""
        return {name: value for name, value in options.items() if name in self.parameters}

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError where one of `options` is out of its range; nothing is computed."""
        one = jax.ShapeDtypeStruct((1,), jnp.float32)
        arrays = {name: one for name, p in self.parameters.items() if p.default is inspect.Parameter.empty}
        jax.eval_shape(functools.partial(self.function, **self.keywords(options)), **arrays)


LOSSES: dict[str, Preference] = {
    "sigmoid": Preference(dpo),
    "hinge": Preference(hinge),
    "ipo": Preference(ipo),
    "robust": Preference(robust),
    "sigmoid_norm": Preference(sigmoid_norm),
    "exo_pair": Preference(exo_pair),
    "discopop": Preference(discopop),
    "nca_pair": Preference(nca_pair),
    "bco_pair": Preference(bco_pair),
    "sppo_hard": Preference(sppo_hard),
    "apo_zero": Preference(apo_zero),
    "apo_down": Preference(apo_down),
    "aot": Preference(aot),
    "aot_unpaired": Preference(aot_unpaired),
    "orpo": Preference(orpo, nll_of_rows=1.0),
    "simpo": Preference(simpo, nll=0.0),
    "cpo": Preference(cpo, nll=1.0),
    "cpo_hinge": Preference(cpo_hinge, nll=1.0),
    "cpo_ipo": Preference(cpo_ipo, nll=1.0),
}


def check_terms(terms: Iterable[str], options: Mapping[str, Any]) -> None:
    """Raises ValueError where an option of LOG_PROB_OPTIONS is on and one of the losses `terms` does not take it."""
    for option, off in LOG_PROB_OPTIONS.items():
        if options.get(option, off) == off:
            continue
        if without := [name for name in terms if option not in LOSSES[name].options]:
            able = ", ".join(name for name, loss in LOSSES.items() if option in loss.options)
            raise ValueError(f"{option} = {options[option]!r} does not go with {without[0]!r}, only with {able}")
