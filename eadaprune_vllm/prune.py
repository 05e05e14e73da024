"""One image's pruning decision: the spectrum says how many tokens stay, the selector says which."""

import time
from dataclasses import dataclass

import torch

from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.selectors import SELECTORS, VisualTokens
from eadaprune_vllm.spectrum import Spectrum


@dataclass(frozen=True)
class Kept:
    """The one object that placeholders, feature rows, positions, report and metrics are made from.

    Attributes:
        indices: ``[k]`` int64, the kept tokens in raster order.
        num_tokens: N, the tokens the image has unpruned.
        energy: share of the spectral energy that a budget of k holds.
        spectrum_seconds: time the spectrum took.
        select_seconds: time the selection took.
    """

    indices: torch.Tensor
    num_tokens: int
    energy: float
    spectrum_seconds: float
    select_seconds: float

    def __len__(self) -> int:
        return len(self.indices)


def prune(tokens: VisualTokens, options: PruneOptions) -> Kept:
    """Decide which of an image's tokens to keep; a pure function of its arguments, the times aside.

    ``enabled=False`` keeps every token by the same path; ``energy=1`` does, up to ``max_tokens``.

    Raises:
        NonFiniteFeaturesError: if any feature is NaN or infinite.
    """
    start = time.perf_counter()
    if not tokens.features.isfinite().all():
        raise NonFiniteFeaturesError("the vision tower produced NaN or infinite features for this image")
    k, energy = tokens.num_tokens, 1.0
    if options.enabled and (options.energy < 1 or (options.max_tokens or k) < k):
        spectrum = Spectrum.of(tokens)
        k = max(spectrum.budget(options.energy), options.min_tokens)
        k = min(k, options.max_tokens or k, tokens.num_tokens)
        energy = spectrum.energy_at(k)
    measured = time.perf_counter()
    if k == tokens.num_tokens:
        indices = torch.arange(k)
    else:
        indices = SELECTORS[options.selector](tokens, k).sort().values
    assert len(indices) == k
    end = time.perf_counter()
    return Kept(indices, tokens.num_tokens, energy, measured - start, end - measured)
