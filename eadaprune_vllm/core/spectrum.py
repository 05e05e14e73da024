"""The budget of E-AdaPrune (arXiv 2603.05950): how many tokens one image deserves.

X is the feature matrix of one image, ``[N, D]``, with singular values sigma_1 >= sigma_2 >= ... The budget is

    k = min { k : sigma_1^2 + ... + sigma_k^2 >= energy * ||X||_F^2 }

from all singular values: their squares are the eigenvalues of the Gram matrix on the smaller side. Thresholds above
``FLOAT32_UP_TO`` take float64. Up to it float32 takes half the time, and a few millionths of ||X||_F^2 are uncertain.
X is used as it is, uncentred and unnormalised, and the total is ||X||_F^2 itself, never a sum of computed values.

An image may come in parts (tiles, temporal patches), each with a matrix and a threshold to reach of its own. A part's
k-th token is then needed at every threshold above E(k-1), the energy of those before it; sorted by this number, the
tokens of all parts make one list, of which any threshold, and any number of tokens, is a beginning.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eadaprune_vllm.core.budget import due, needed
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.errors import NonFiniteFeaturesError

FLOAT32_UP_TO = 0.999
_MOST_ENERGY = torch.finfo(torch.float32).max  # selectors, which come after, go by float32


@dataclass(frozen=True)
class Spectrum:
    """Energy of one image, part by part.

    Attributes:
        thresholds: ``[N]`` float64, ascending: the thresholds from which one token more is needed.
        part: ``[N]`` int64, the part that this token comes from.
        cumulative: ``[N]`` float64; entry k-1 is the share of all parts' energy that the first k tokens of this list
            hold, 1.0 for zero matrices.
        num_parts: number of parts.
        seconds: the time it took.
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
        """The fewest tokens with which every part reaches ``energy`` (0 < energy <= 1) of its own total.

        ``energy = 1`` asks for every token, whatever the rank. A zero matrix needs one token.
        """
        return int(needed(self.thresholds.numpy(), energy))

    def allocate(self, k: int) -> list[int]:
        """How many of ``k`` tokens go to each part: those that reach the highest threshold common to all."""
        return torch.bincount(self.part[:k], minlength=self.num_parts).tolist()

    def energy_at(self, k: int) -> float:
        """The share of all energy that ``k`` tokens hold."""
        return 1.0 if k >= self.num_tokens else float(self.cumulative[k - 1])

    def curve(self, points: int = 64) -> list[tuple[int, float]]:
        """At most ``points`` pairs of k and ``energy_at(k)``, denser where k is small, the first and last included."""
        steps = {round(self.num_tokens ** (i / (points - 1))) for i in range(points)}
        return [(k, self.energy_at(k)) for k in sorted(steps)]


def precision(energy: float) -> torch.dtype:
    """In which a spectrum is computed for thresholds up to this one."""
    return torch.float32 if energy <= FLOAT32_UP_TO else torch.float64


def spectra(images: Sequence[Sequence[VisualTokens]], dtypes: Sequence[torch.dtype]) -> list[Spectrum | None]:
    """The spectra of images, each in parts, all at once.

    Args:
        images: the parts of each.
        dtypes: for each, in which it is computed.

    Returns:
        None for those whose features, or their energy in float32, are not finite.
    """
    start = time.perf_counter()
    grams = [tokens.gram(dtype) for parts, dtype in zip(images, dtypes, strict=True) for tokens in parts]
    found = iter(_energies(grams))
    energies = [[next(found) for _ in parts] for parts in images]
    seconds = (time.perf_counter() - start) / max(len(images), 1)
    return [
        _spectrum(parts, of_parts, seconds) if all(total <= _MOST_ENERGY for _, total in of_parts) else None
        for parts, of_parts in zip(images, energies, strict=True)
    ]


def spanned(parts: Sequence[VisualTokens], energy: float, least: int) -> Spectrum:
    """Instead of an image's spectrum, of each part the energy in the span of the tokens that ``span`` chooses one
    by one. That is never more than as many singular values hold, so budgets are never less than by the spectrum, and
    the tokens themselves reach the threshold.

    Args:
        parts: of the image.
        energy: threshold up to which it is right, and
        least: number of tokens up to which it is.

    Raises:
        NonFiniteFeaturesError: if any feature is NaN or infinite, or their energy overflows float32.
    """
    start = time.perf_counter()
    energies = []
    for tokens in parts:
        pivots, total = tokens.pivots, tokens.pivots.total
        if not math.isfinite(total):
            raise _not_finite()
        reached = float(due(energy)) * total
        pivots.choose(least, reached)
        gains = pivots.gains or [1.0]  # of a zero matrix one is needed
        if sum(gains) < reached:  # each of the others holds what is left of it at least
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
    # Of tokens that are needed at once, those that hold more come first.
    gain = torch.cat(gains)
    by_gain = gain.argsort(descending=True, stable=True)
    ascending, order = torch.cat(thresholds)[by_gain].sort(stable=True)
    order = by_gain[order]
    held, total = gain[order].cumsum(0), sum(total for _, total in energies)
    cumulative = (held / total).clamp(max=1) if total else torch.ones_like(held)
    return Spectrum(
        ascending, torch.arange(len(parts)).repeat_interleave(sizes)[order], cumulative, len(parts), seconds
    )


def _energies(grams: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
    """Of each Gram matrix ``[n, n]`` its eigenvalues as shares of their total, descending, ``[n]`` float64, and the
    total, which may not be finite. Those of one size are computed together: many take a GPU little longer than one."""
    # Of a zero matrix one token holds everything.
    ones = torch.ones(1, dtype=torch.float64)
    found: dict[int, tuple[torch.Tensor, float]] = {}
    by_size: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
    for index, gram in enumerate(grams):
        by_size[len(gram), gram.dtype].append(index)
    for indices in by_size.values():
        totals = torch.stack([grams[index].diagonal().double().sum() for index in indices]).tolist()
        found |= {index: (ones, total) for index, total in zip(indices, totals, strict=True)}
        having = [index for index in indices if 0 < found[index][1] <= _MOST_ENERGY]
        if having:
            eigenvalues = torch.linalg.eigvalsh(torch.stack([grams[index] for index in having]))
            for index, values in zip(having, eigenvalues.cpu().flip(1).clamp(min=0).double(), strict=True):
                found[index] = values / found[index][1], found[index][1]
    return [found[index] for index in range(len(grams))]
