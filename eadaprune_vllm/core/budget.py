"""From spectra and options to numbers of tokens, and from a mean share of tokens to a threshold. Without torch:
commands count where no model runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eadaprune_vllm.core.options import PruneOptions

TIE_TOLERANCE = 1e-6  # see ``due``
_DIGITS = 6  # of a threshold that is solved for
_FULL_RANK = 0.9  # if no picture needs this share of its tokens at any threshold, its features are of a smaller one


def due(energy: float | NDArray[np.float64]) -> Any:
    """What tokens must hold for a threshold to count as met. It is a little more, so that rounding does not decide at
    ties, and k is rounded up: at most ``TIE_TOLERANCE`` of the energy, and a thousandth of what may be left out."""
    return energy + np.minimum(TIE_TOLERANCE, (1 - np.asarray(energy)) / 1000)


def needed(thresholds: NDArray[np.float64], energy: float | NDArray[np.float64]) -> Any:
    """The fewest tokens that reach a threshold.

    Args:
        thresholds: ``[N]`` float64, as in ``Spectrum``.
        energy: the threshold, 0 < energy <= 1, or an array of such; 1 asks for every token.

    Returns:
        An integer, or an array of such.
    """
    reached = np.searchsorted(thresholds, due(energy))
    return np.where(np.less(energy, 1), reached, len(thresholds))


def clamped(needed: Any, num_tokens: int, options: PruneOptions) -> Any:
    """The budget, or budgets, of an image of ``num_tokens`` tokens, of which it needs ``needed`` to reach the
    threshold."""
    most = min(options.max_tokens or num_tokens, num_tokens)
    return np.clip(needed, min(options.floor(num_tokens), most), most)


@dataclass(frozen=True)
class Curve:
    """One picture's spectrum.

    Attributes:
        name: of what it is.
        thresholds: ``[N]`` float64, as in ``Spectrum``.
    """

    name: str
    thresholds: NDArray[np.float64]

    def budget(self, options: PruneOptions) -> int:
        """What ``prune`` would decide."""
        if not options.enabled:
            return len(self.thresholds)
        return int(clamped(needed(self.thresholds, options.threshold), len(self.thresholds), options))

    def share(self, options: PruneOptions) -> float:
        """The same as a share of all tokens."""
        return self.budget(options) / len(self.thresholds)


class Targets:
    """The thresholds at which pictures keep a share of their tokens on average.

    Args:
        curves: of the pictures.
        options: of all of them, the threshold aside.
    """

    def __init__(self, curves: Sequence[Curve], options: PruneOptions) -> None:
        self.curves = curves
        steps = np.unique(np.round(np.concatenate([curve.thresholds for curve in curves]), _DIGITS))
        self._energies = np.clip(steps, 10.0**-_DIGITS, 1 - 2 * TIE_TOLERANCE)  # no rounding counts as energy
        shares = [
            clamped(needed(curve.thresholds, self._energies), len(curve.thresholds), options) / len(curve.thresholds)
            for curve in curves
        ]
        self._means = np.mean(shares, 0)
        self._max_share = float(np.max(shares))

    @property
    def least(self) -> float:
        """The least share that any threshold gives."""
        return float(self._means[0])

    @property
    def most(self) -> float:
        """The largest share below that of energy 1.0: what the rank of the features allows."""
        return float(self._means[-1])

    @property
    def max_default_target(self) -> float:
        """The largest share at which budgets still differ. Where features are of a small rank, every picture keeps near
        the most as much as it can."""
        return self.most if self._max_share > _FULL_RANK else max(self.least, round(self.most * 2 / 3, 3))

    def energy(self, target: float) -> float:
        """The threshold below 1.0 at which the mean share is closest to ``target``."""
        return float(self._energies[np.abs(self._means - target).argmin()])
