"""Losses: pure functions on arrays, one a paper, that return unreduced values; and the table of those of pairs."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.losses.absolute import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from jaxalign.losses.distillation import generalized_jsd
from jaxalign.losses.policy import POLICY, Surrogate, cispo, gmpo, grpo, policy_ratio, reinforce, sapo, vespo
from jaxalign.losses.policy import options_of as policy_options
from jaxalign.losses.preference import discopop, dpo, exo_pair, hinge, ipo, robust, sigmoid_norm
from jaxalign.losses.ratios import PairLosses
from jaxalign.losses.reference_free import cpo, cpo_hinge, cpo_ipo, orpo, simpo
from jaxalign.losses.reward import attributes, bradley_terry, compose
from jaxalign.losses.supervised import TOKEN_LOSSES
from jaxalign.losses.transport import aot, aot_unpaired
from jaxalign.losses.triples import tpo, tpo_hinge, tpo_ipo, tpo_l
from jaxalign.losses.unpaired import UNPAIRED, apo_zero_unpaired, bco, kto

__all__ = [
    "LOG_PROB_OPTIONS", "LOSSES", "POLICY", "TOKEN_LOSSES", "UNPAIRED", "PairLosses", "Preference", "Surrogate", "aot",
    "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "attributes", "bco", "bco_pair", "bradley_terry",
    "check_terms", "cispo", "compose", "cpo", "cpo_hinge", "cpo_ipo", "discopop", "dpo", "exo_pair", "generalized_jsd",
    "gmpo", "grpo", "hinge", "ipo", "kto", "nca_pair", "orpo", "policy_options", "policy_ratio", "reinforce", "robust",
    "sapo", "sigmoid_norm", "simpo", "sppo_hard", "tpo", "tpo_hinge", "tpo_ipo", "tpo_l", "vespo",
]  # fmt: skip

LOG_PROB_OPTIONS: dict[str, Any] = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
"""Options of what a pair's log-probs mean, with the values that switch them off: all losses of a sum must take them."""


@dataclass(frozen=True)
class Preference:
    """A loss of pairs as `loss.name` selects it; what it takes is read from its signature.

    Attributes:
      function: the loss.
      nll: weight of a token NLL that is added to the loss: that of the chosen responses, where the option `cpo_alpha`
        sets another weight, or of the gold responses of triples (`tpo_alpha`).
      nll_of_rows: the NLL is that of the whole chosen rows, prompt and response, with this fixed weight.
      kind: what an example is: pairs, or triples, which have a gold response too.
    """

    function: Callable[..., PairLosses]
    nll: float | None = None
    nll_of_rows: float = 0.0
    kind: str = "pairs"

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
        """Whether a pair's loss depends on the other pairs of the batch; then `weight` [P] is to be given."""
        return "weight" in self.parameters

    @property
    def nll_side(self) -> str:
        """Whose NLL `nll` is about."""
        return "gold" if self.kind == "triples" else "chosen"

    @property
    def nll_option(self) -> str:
        """The option that sets another `nll`."""
        return "tpo_alpha" if self.kind == "triples" else "cpo_alpha"

    @property
    def options(self) -> dict[str, Any]:
        """The options that a config may set, with their defaults: the function's and those that the objective reads."""
        options = {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if parameter.default is not inspect.Parameter.empty and name != "weight"
        }
        if self.nll is not None:
            options[self.nll_option] = self.nll
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
    "tpo": Preference(tpo, nll=1.0, kind="triples"),
    "tpo_hinge": Preference(tpo_hinge, nll=1.0, kind="triples"),
    "tpo_ipo": Preference(tpo_ipo, nll=1.0, kind="triples"),
    "tpo_l": Preference(tpo_l, nll=1.0, kind="triples"),
}


def check_terms(terms: Iterable[str], options: Mapping[str, Any]) -> None:
    """Raises ValueError where an option of LOG_PROB_OPTIONS is on and one of the losses `terms` does not take it."""
    for option, off in LOG_PROB_OPTIONS.items():
        if options.get(option, off) == off:
            continue
        if without := [name for name in terms if option not in LOSSES[name].options]:
            able = ", ".join(name for name, loss in LOSSES.items() if option in loss.options)
            raise ValueError(f"{option} = {options[option]!r} does not go with {without[0]!r}, only with {able}")
