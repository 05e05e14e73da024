"""From spectra and options to budgets, and from a mean share of tokens (a target) to a threshold.

Without torch, because commands use it on machines without a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eadaprune_vllm.core.options import PruneOptions

TIE_TOLERANCE = 1e-6  # see ``required_energy``
_DIGITS = 6  # of a threshold that is solved for
_FULL_RANK = 0.9  # if no picture needs this share of its tokens at any threshold, the features have a smaller rank


def required_energy(threshold: float | NDArray[np.float64]) -> Any:
    """The share of the energy that tokens must hold to reach a threshold.

    It is slightly above the threshold, so that ties are rounded up and not decided by rounding errors: by at most
    ``TIE_TOLERANCE``, and by at most a thousandth of the energy that may be dropped.
    """
    return threshold + np.minimum(TIE_TOLERANCE, (1 - np.asarray(threshold)) / 1000)


def tokens_needed(thresholds: NDArray[np.float64], energy: float | NDArray[np.float64]) -> Any:
    """The smallest number of tokens that reaches a threshold.

    Args:
        thresholds: ``[N]`` float64, as in ``Spectrum``.
        energy: the threshold, 0 < energy <= 1, or an array of thresholds; 1 needs every token.

    Returns:
        An integer, or an array of integers.
    """
    reached = np.searchsorted(thresholds, required_energy(energy))
    return np.where(np.less(energy, 1), reached, len(thresholds))


def clamp_budget(needed: Any, num_tokens: int, options: PruneOptions) -> Any:
    """The budget within the bounds of the options.

    Args:
        needed: tokens that reach the threshold: an integer, or an array of integers.
        num_tokens: tokens of the image.
        options: with the bounds.
    """
    high = min(options.max_tokens or num_tokens, num_tokens)
    return np.clip(needed, min(options.floor(num_tokens), high), high)


@dataclass(frozen=True)
class Curve:
    """The spectrum of one picture.

    Attributes:
        name: of the picture, or its kind.
        thresholds: ``[N]`` float64, as in ``Spectrum``.
    """

    name: str
    thresholds: NDArray[np.float64]

    def budget(self, options: PruneOptions) -> int:
        """The number of tokens that ``prune`` would keep."""
        if not options.enabled:
            return len(self.thresholds)
        needed = tokens_needed(self.thresholds, options.threshold)
        return int(clamp_budget(needed, len(self.thresholds), options))

    def share(self, options: PruneOptions) -> float:
        """The budget as a share of all tokens."""
        return self.budget(options) / len(self.thresholds)


class Targets:
    """Thresholds by target: the share of their tokens that pictures keep on average.

    Args:
        curves: of the pictures.
        options: for all pictures; their threshold is ignored.
    """

    def __init__(self, curves: Sequence[Curve], options: PruneOptions) -> None:
        self.curves = curves
        steps = np.unique(np.round(np.concatenate([curve.thresholds for curve in curves]), _DIGITS))
        self._energies = np.clip(steps, 10.0**-_DIGITS, 1 - 2 * TIE_TOLERANCE)  # rounding errors are not energy
        shares = []
        for curve in curves:
            needed, num_tokens = tokens_needed(curve.thresholds, self._energies), len(curve.thresholds)
            shares.append(clamp_budget(needed, num_tokens, options) / num_tokens)
        self._means = np.mean(shares, 0)
        self._max_share = float(np.max(shares))

    @property
    def min_target(self) -> float:
        """The smallest share that a threshold gives."""
        return float(self._means[0])

    @property
    def max_target(self) -> float:
        """The largest share that a threshold below 1.0 gives. The rank of the features limits it."""
        return float(self._means[-1])

    @property
    def max_default_target(self) -> float:
        """The largest share at which budgets still differ between pictures. With features of a small rank, near
        ``max_target`` every picture keeps as many tokens as the rank."""
        if self._max_share > _FULL_RANK:
            return self.max_target
        return max(self.min_target, round(self.max_target * 2 / 3, 3))

    def nearest(self, target: float) -> float:
        """The target, or the nearest one at which budgets differ between pictures if no threshold reaches it."""
        if self.min_target <= target <= self.max_target:
            return target
        return min(max(target, self.min_target), self.max_default_target)

    def energy(self, target: float) -> float:
        """The threshold below 1.0 at which the mean share is closest to ``target``."""
        return float(self._energies[np.abs(self._means - target).argmin()])
