"""From a spectrum and options to a number of tokens. Without torch: commands count where no model runs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eadaprune_vllm.options import PruneOptions

# float32 eigenvalues make the cumulative energy uncertain by about this share of the total. A threshold met only
# within it counts as not met, so that k is rounded up at ties.
TIE_TOLERANCE = 1e-6


def needed(needed_above: NDArray[Any], energy: float) -> int:
    """The fewest tokens that reach a threshold.

    Args:
        needed_above: ``[N]`` float64, as in ``Spectrum``.
        energy: the threshold, 0 < energy <= 1; 1 asks for every token.
    """
    if energy >= 1:
        return len(needed_above)
    return int(np.searchsorted(needed_above, min(energy + TIE_TOLERANCE, 1.0)))


def clamped(needed: int, num_tokens: int, options: PruneOptions) -> int:
    """The budget of an image of ``num_tokens`` tokens, of which it needs ``needed`` to reach the threshold."""
    k = max(needed, options.min_tokens)
    return min(k, options.max_tokens or k, num_tokens)
