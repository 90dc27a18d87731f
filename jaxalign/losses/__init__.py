"""Losses: pure functions on arrays, one a paper, that return unreduced values."""

from jaxalign.losses.preference import LOSSES, Preference, dpo, hinge, ipo, robust, sigmoid_norm

__all__ = ["LOSSES", "Preference", "dpo", "hinge", "ipo", "robust", "sigmoid_norm"]
