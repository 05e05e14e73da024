"""The budget of E-AdaPrune (arXiv 2603.05950): how many tokens an image keeps.

X is the feature matrix of one image, ``[N, D]``, with singular values sigma_1 >= sigma_2 >= ... The budget is

    k = min { k : sigma_1^2 + ... + sigma_k^2 >= energy * ||X||_F^2 }

The squared singular values are the eigenvalues of the smaller Gram matrix; all of them are computed. Thresholds above
``FLOAT32_UP_TO`` need float64. Up to it float32 is used: it takes half the time, and its error is a few millionths of
||X||_F^2. X is neither centred nor normalised, and the total is ||X||_F^2 itself, not the sum of the eigenvalues.

An image may have several parts (tiles, temporal patches). Each part has a matrix of its own, and has to reach the
threshold by itself. The k-th token of a part is needed at every threshold above E(k-1), the share of the energy of the
tokens before it. The tokens of all parts, sorted by this number, are one list: every threshold, and every number of
tokens, corresponds to a prefix of it.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eadaprune_vllm.core.budget import required_energy, tokens_needed
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.errors import NonFiniteFeaturesError

FLOAT32_UP_TO = 0.999
_MAX_ENERGY = torch.finfo(torch.float32).max  # selectors compute in float32


@dataclass(frozen=True)
class Spectrum:
    """The energy of one image, as the list of tokens described above.

    Attributes:
        thresholds: ``[N]`` float64, ascending: the threshold above which each token is needed.
        part: ``[N]`` int64, the part of each token.
        cumulative: ``[N]`` float64; entry k-1 is the share of the energy of all parts in the first k tokens of the
            list; 1.0 for zero matrices.
        num_parts: number of parts.
        seconds: time of the computation.
    """

    thresholds: torch.Tensor
    part: torch.Tensor
    cumulative: torch.Tensor
    num_parts: int
    seconds: float = 0

    @classmethod
    def of(cls, parts: Sequence[VisualTokens], dtype: torch.dtype = torch.float64) -> "Spectrum":
        """Raises:
        NonFiniteFeaturesError: if any feature is NaN or infinite, or their energy overflows float32.
        """
        (found,) = spectra([parts], [dtype])
        if found is None:
            raise _not_finite()
        return found

    @property
    def num_tokens(self) -> int:
        return len(self.part)

    def budget(self, energy: float) -> int:
        """The smallest number of tokens with which every part reaches ``energy`` (0 < energy <= 1) of its own total.

        ``energy = 1`` needs every token, whatever the rank. A zero matrix needs one token.
        """
        return int(tokens_needed(self.thresholds.numpy(), energy))

    def allocate(self, k: int) -> list[int]:
        """How many of ``k`` tokens each part gets, so that all parts reach the highest common threshold."""
        return torch.bincount(self.part[:k], minlength=self.num_parts).tolist()

    def energy_at(self, k: int) -> float:
        """The share of the energy of all parts in ``k`` tokens."""
        return 1.0 if k >= self.num_tokens else float(self.cumulative[k - 1])

    def curve(self, points: int = 64) -> list[tuple[int, float]]:
        """At most ``points`` pairs of k and ``energy_at(k)``, denser for small k, with the first and the last."""
        steps = {round(self.num_tokens ** (i / (points - 1))) for i in range(points)}
        return [(k, self.energy_at(k)) for k in sorted(steps)]


def precision(energy: float) -> torch.dtype:
    """The dtype that a spectrum needs to be exact up to this threshold."""
    return torch.float32 if energy <= FLOAT32_UP_TO else torch.float64


def spectra(images: Sequence[Sequence[VisualTokens]], dtypes: Sequence[torch.dtype]) -> list[Spectrum | None]:
    """The spectra of several images, computed in batches.

    Args:
        images: the parts of each image.
        dtypes: of each image's computation.

    Returns:
        A spectrum per image; None if its features, or their energy in float32, are not finite.
    """
    start = time.perf_counter()
    grams = [tokens.smaller_gram(dtype) for parts, dtype in zip(images, dtypes, strict=True) for tokens in parts]
    found = iter(_energies(grams))
    energies = [[next(found) for _ in parts] for parts in images]
    seconds = (time.perf_counter() - start) / max(len(images), 1)
    return [
        _spectrum(parts, of_parts, seconds) if all(total <= _MAX_ENERGY for _, total in of_parts) else None
        for parts, of_parts in zip(images, energies, strict=True)
    ]


def span_spectrum(parts: Sequence[VisualTokens], energy: float, min_tokens: int) -> Spectrum:
    """A spectrum by span: the energy of k tokens is that in the span of the first k tokens that ``span`` chooses.

    This is at most the energy of the k largest squared singular values. So budgets are at least those by singular
    values, and the kept tokens themselves reach the threshold.

    Args:
        parts: of the image.
        energy: the result is exact up to this threshold,
        min_tokens: and up to this number of tokens.

    Raises:
        NonFiniteFeaturesError: if any feature is NaN or infinite, or their energy overflows float32.
    """
    start = time.perf_counter()
    energies = []
    for tokens in parts:
        pivots, total = tokens.pivots, tokens.pivots.total
        if not math.isfinite(total):
            raise _not_finite()
        required = float(required_energy(energy)) * total
        pivots.choose(min_tokens, required)
        gains = pivots.gains or [1.0]  # a zero matrix needs one token
        if sum(gains) < required:  # each of the others adds at least its residual
            gains = [*gains, *sorted(pivots.residual[pivots.residual > 0].tolist(), reverse=True)]
        energies.append((torch.tensor(gains, dtype=torch.float64) / (total or 1.0), total))
    return _spectrum(parts, energies, time.perf_counter() - start)


def _not_finite() -> NonFiniteFeaturesError:
    return NonFiniteFeaturesError("the energy of this image's features is NaN or infinite")


def _spectrum(
    parts: Sequence[VisualTokens], energies: Sequence[tuple[torch.Tensor, float]], seconds: float
) -> Spectrum:
    thresholds, gains = [], []
    for tokens, (share, total) in zip(parts, energies, strict=True):
        before = torch.ones(tokens.num_tokens, dtype=torch.float64)
        before[: len(share)] = torch.cat((share.new_zeros(1), share.cumsum(0)[:-1])).clamp(max=1)
        thresholds.append(before)
        gains.append(torch.zeros_like(before))
        gains[-1][: len(share)] = share * total
    sizes = torch.tensor([tokens.num_tokens for tokens in parts])
    # Tokens needed at the same threshold are sorted by their energy.
    gain = torch.cat(gains)
    by_gain = gain.argsort(descending=True, stable=True)
    ascending, order = torch.cat(thresholds)[by_gain].sort(stable=True)
    order = by_gain[order]
    energy, total = gain[order].cumsum(0), sum(total for _, total in energies)
    cumulative = (energy / total).clamp(max=1) if total else torch.ones_like(energy)
    return Spectrum(
        ascending, torch.arange(len(parts)).repeat_interleave(sizes)[order], cumulative, len(parts), seconds
    )


def _energies(grams: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
    """The eigenvalues of each Gram matrix ``[n, n]``.

    Matrices of one size are one batch: for a GPU many take little longer than one.

    Returns:
        Of each matrix its eigenvalues as shares of the total, descending, ``[n]`` float64; and the total, which may be
        infinite or NaN.
    """
    # In a zero matrix one token holds all of the energy.
    ones = torch.ones(1, dtype=torch.float64)
    found: dict[int, tuple[torch.Tensor, float]] = {}
    by_size: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
    for index, gram in enumerate(grams):
        by_size[len(gram), gram.dtype].append(index)
    for indices in by_size.values():
        totals = torch.stack([grams[index].diagonal().double().sum() for index in indices]).tolist()
        found |= {index: (ones, total) for index, total in zip(indices, totals, strict=True)}
        solvable = [index for index in indices if 0 < found[index][1] <= _MAX_ENERGY]
        if solvable:
            eigenvalues = torch.linalg.eigvalsh(torch.stack([grams[index] for index in solvable]))
            for index, values in zip(solvable, eigenvalues.cpu().flip(1).clamp(min=0).double(), strict=True):
                found[index] = values / found[index][1], found[index][1]
    return [found[index] for index in range(len(grams))]
