"""Which k of an image's N visual tokens stay.

A selector is a function ``(tokens, k) -> indices``: it gets what is known about the N tokens and returns k
distinct int64 indices in any order. To add one, write the function and add a line to ``SELECTORS``.
Every selector must be deterministic; at ties the lower index wins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class VisualTokens:
    """What the vision encoder says about the tokens of one image, or of a part of one.

    Attributes:
        features: ``[N, D]``, in the order of the prompt.
        attention: ``[N]`` float32, how much attention each token draws in the last used layer of the tower; None
            where there is no tower to ask.
    """

    features: torch.Tensor
    attention: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.features.shape[0]

    @cached_property
    def token_gram(self) -> torch.Tensor:
        """``X X^T``, ``[N, N]`` float32, shared by the spectrum and the ``span`` selector where N <= D."""
        rows = self.features.float()
        return rows @ rows.T

    def take(self, indices: torch.Tensor) -> "VisualTokens":
        """Some of the tokens, by their indices ``[n]`` int64."""
        attention = self.attention
        return VisualTokens(self.features[indices], None if attention is None else attention[indices])

    def cpu(self) -> "VisualTokens":
        """The same in the CPU's memory."""
        return VisualTokens(self.features.cpu(), None if self.attention is None else self.attention.cpu())


Selector = Callable[[VisualTokens, int], torch.Tensor]


def attention(tokens: VisualTokens, k: int) -> torch.Tensor:
    """The k tokens that draw the most attention (FasterVLM's score, arXiv 2412.01818)."""
    assert tokens.attention is not None, "the options said span"
    return torch.sort(tokens.attention, descending=True, stable=True).indices[:k]


def span(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Greedy column subset selection by pivoted Cholesky: next is the token with most energy outside the span
    of those already chosen.

    After j picks ``residual`` holds, for every token, the squared norm of its part outside that span, so that
    it sums to ``||X - P X||_F^2``. Once nothing is left, the remaining picks are the first tokens in raster order.
    """
    # Each step is a little work on vectors, for which NumPy takes a tenth of torch's time.
    rows = tokens.features.float().numpy()
    # Row by row where the Gram matrix would be larger than the features.
    gram = tokens.token_gram.numpy() if tokens.num_tokens <= rows.shape[1] else None
    residual = np.square(rows).sum(1)
    # Below this a residual is rounding error of float32, not energy.
    floor = residual.max() * np.finfo(np.float32).eps * tokens.num_tokens
    factor = np.empty((k, tokens.num_tokens), np.float32)
    chosen: list[int] = []
    for step in range(k):
        pivot = int(residual.argmax())
        if residual[pivot] <= floor:
            taken = set(chosen)
            chosen += [i for i in range(tokens.num_tokens) if i not in taken][: k - step]
            break
        chosen.append(pivot)
        row = rows @ rows[pivot] if gram is None else gram[pivot]
        row = (row - factor[:step, pivot] @ factor[:step]) / np.sqrt(residual[pivot])
        factor[step] = row
        residual -= row * row
        residual[pivot] = -np.inf
    return torch.tensor(chosen, dtype=torch.int64)


SELECTORS: dict[str, Selector] = {
    "attention": attention,
    "span": span,
}
