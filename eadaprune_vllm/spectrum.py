"""The budget of E-AdaPrune (arXiv 2603.05950): how many tokens one image deserves.

X is the feature matrix of one image, ``[N, D]``, with singular values sigma_1 >= sigma_2 >= ... The budget is

    k = min { k : sigma_1^2 + ... + sigma_k^2 >= energy * ||X||_F^2 }

computed exactly: the squared singular values are the eigenvalues of the Gram matrix on the smaller side.
X is used as it is, uncentred and unnormalised, and the total is ||X||_F^2 itself, never a sum of computed values.
"""

from dataclasses import dataclass

import torch

from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.selectors import VisualTokens

# float32 eigenvalues make the cumulative energy uncertain by about this share of the total. A threshold met only
# within it counts as not met, so that k is rounded up at ties.
TIE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Cumulative energy of one image.

    Attributes:
        cumulative: ``[min(N, D)]`` float64; entry k-1 is the share of the energy in the top k singular values.
            All zeros for a zero matrix.
        num_tokens: N.
    """

    cumulative: torch.Tensor
    num_tokens: int

    @classmethod
    def of(cls, tokens: VisualTokens) -> "Spectrum":
        """Raises:
        NonFiniteFeaturesError: if any feature is NaN or infinite, or their energy overflows float32.
        """
        num_tokens, width = tokens.features.shape
        if num_tokens <= width:
            gram = tokens.token_gram
        else:
            rows = tokens.features.float()
            gram = rows.T @ rows
        total = gram.diagonal().double().sum()
        if not torch.isfinite(total):
            raise NonFiniteFeaturesError("the energy of this image's features is NaN or infinite")
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).double()
        share = eigenvalues / total if total > 0 else torch.zeros_like(eigenvalues)
        return cls(share.cumsum(0).clamp(max=1), num_tokens)

    def budget(self, energy: float) -> int:
        """The smallest k whose top k squared singular values reach ``energy`` (0 < energy <= 1) of the total.

        ``energy = 1`` asks for every token, whatever the rank. A zero matrix needs one token.
        """
        if energy >= 1:
            return self.num_tokens
        if not self.cumulative[-1] > 0:
            return 1
        short = int((self.cumulative < energy + TIE_TOLERANCE).sum())
        return min(short + 1, self.num_tokens)

    def energy_at(self, k: int) -> float:
        """The share of the energy that the top k squared singular values hold; 1.0 for a zero matrix."""
        if not self.cumulative[-1] > 0 or k >= len(self.cumulative):
            return 1.0
        return float(self.cumulative[k - 1])

    def curve(self, points: int = 64) -> list[tuple[int, float]]:
        """At most ``points`` pairs of k and ``energy_at(k)``, denser where k is small, the first and last included."""
        steps = {round(len(self.cumulative) ** (i / (points - 1))) for i in range(points)}
        return [(k, self.energy_at(k)) for k in sorted(steps)]
