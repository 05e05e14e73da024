"""Which k of an image's N visual tokens stay.

A selector is a function ``(tokens, k) -> indices``: it gets what is known about the N tokens and returns k
distinct int64 indices in any order. To add one, write the function, and add it to ``SELECTORS`` and its name to
``options.SELECTOR_NAMES``.
Every selector must be deterministic; at ties the lower index wins. What it costs must be bounded: clients choose k, and
each step of a greedy selector looks at every token.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

# Tokens that are chosen one by one. Of more, the rest are chosen at once, by what they are worth after these.
GREEDY_STEPS = 1024
# What is left of a token below this share of its own energy is rounding error of float32, which stays below half of it.
_ROUNDING = 64 * np.finfo(np.float32).eps
_precision = threading.Lock()


class PivotedCholesky:
    """Greedy column subset selection by pivoted Cholesky: next is the token with most energy outside the span of those
    already chosen. Goes on from where it stopped.

    Args:
        gram: ``[N, N]`` float32, ``X X^T``.

    Attributes:
        total: ``||X||_F^2``, which may not be finite.
        chosen: tokens, in this order.
        gains: by how much the energy in their span grew with each, so that the first j sum to ``||P X||_F^2``.
        residual: ``[N]`` float32, for every token the squared norm of its part outside the span, so that it sums to
            ``||X - P X||_F^2``; minus infinity for those chosen.
    """

    def __init__(self, gram: NDArray[np.float32]) -> None:
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.residual = gram.diagonal().copy()
        self.total = float(self.residual.sum(dtype=np.float64))
        self._gram = gram
        self._rounding = self.residual * _ROUNDING
        self._factor = np.empty((min(len(gram), GREEDY_STEPS), len(gram)), np.float32)

    def choose(self, k: int, energy: float = 0.0) -> None:
        """Go on until there are ``k``, and these span so much energy, for ``GREEDY_STEPS`` and as long as any is left
        outside their span."""
        factor, residual, held = self._factor, self.residual, sum(self.gains)
        for step in range(len(self.chosen), len(factor)):
            if step >= k and held >= energy:
                break
            pivot = int(residual.argmax())
            if residual[pivot] <= self._rounding[pivot]:
                residual[(residual <= self._rounding) & (residual > -np.inf)] = 0  # nothing is left of these
                pivot = int(residual.argmax())
                if residual[pivot] <= 0:
                    break
            row = (self._gram[pivot] - factor[:step, pivot] @ factor[:step]) / np.sqrt(residual[pivot])
            factor[step] = row
            squares = row * row
            residual -= squares
            residual[pivot] = -np.inf
            self.chosen.append(pivot)
            self.gains.append(float(squares.sum()))
            held += self.gains[-1]

    def held(self, k: int) -> float | None:
        """The energy in the span of the ``k`` tokens that ``span`` chooses; None if some of them were not chosen one by
        one, and hold more than those that were."""
        beyond = k > len(self.chosen) and self.residual.max() > 0
        return None if beyond else min(sum(self.gains[:k]), self.total)


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
        """``X X^T``, ``[N, N]`` float32, shared by spectrum and selection."""
        return _gram(self.features.float())

    def gram(self, dtype: torch.dtype) -> torch.Tensor:
        """The Gram matrix of the smaller side, ``[min(N, D)] * 2``: of the same eigenvalues, zeros aside.

        Args:
            dtype: float32 or float64, in which it is computed.
        """
        if self.num_tokens > self.features.shape[1]:
            return _gram(self.features.T.to(dtype))
        return self.token_gram if dtype == torch.float32 else _gram(self.features.to(dtype))

    @property
    def products(self) -> NDArray[np.float32]:
        """``token_gram`` in NumPy: a step of a selector is a little work on vectors, which takes torch ten times as
        long, and a GPU longer."""
        products: NDArray[np.float32] = self.token_gram.cpu().numpy()
        return products

    @cached_property
    def pivots(self) -> PivotedCholesky:
        """Shared by a budget that goes by them and the selection."""
        return PivotedCholesky(self.products)

    def take(self, indices: torch.Tensor) -> "VisualTokens":
        """Some of the tokens, by their indices ``[n]`` int64."""
        attention = self.attention
        return VisualTokens(self.features[indices], None if attention is None else attention[indices])


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """``rows rows^T``, not in TF32 or bfloat16, which ``VLLM_FLOAT32_MATMUL_PRECISION`` allows the model's products.

    That setting is the process's, there is none of a thread. What another thread multiplies meanwhile is more exact
    than it need be; the lock keeps two of us from restoring each other's setting.
    """
    with _precision:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return rows @ rows.T
        finally:
            torch.set_float32_matmul_precision(before)


Selector = Callable[[VisualTokens, int], torch.Tensor]


def attention(tokens: VisualTokens, k: int) -> torch.Tensor:
    """The k tokens that draw the most attention (FasterVLM's score, arXiv 2412.01818)."""
    assert tokens.attention is not None, "the options said span"
    return torch.sort(tokens.attention, descending=True, stable=True).indices[:k]


def span(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Those that ``PivotedCholesky`` chooses; once nothing is left outside their span, the first in raster order,
    and after ``GREEDY_STEPS`` those with most left."""
    pivots = tokens.pivots
    pivots.choose(k)
    return _with_rest(pivots.chosen, -pivots.residual, k)


def diversity(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Greedy max-min distance, as in DivPrune (arXiv 2503.02175): next is the token least like the one most like it
    among those already chosen, by the cosine of their features. First is the token least like all on average."""
    return _diverse(tokens, k, [])


def hybrid(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Half by ``attention``, and then those least like any that are chosen, in the manner of VisPruner
    (arXiv 2412.01818)."""
    return _diverse(tokens, k, attention(tokens, (k + 1) // 2).tolist())


def uniform(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Every N/k-th token in raster order, whatever the image shows."""
    return (torch.arange(k, dtype=torch.int64) * 2 + 1) * tokens.num_tokens // (2 * max(k, 1))


def random(tokens: VisualTokens, k: int) -> torch.Tensor:
    """The first k of an order drawn once for each N: the same for all images, so that an image has one result."""
    return torch.from_numpy(np.random.default_rng(0).permutation(tokens.num_tokens)[:k]).long()


def _diverse(tokens: VisualTokens, k: int, chosen: list[int]) -> torch.Tensor:
    """``chosen``, and after them those that ``diversity`` would go on with."""
    gram = tokens.products
    energy = gram.diagonal()
    norms = np.sqrt(np.where(energy > 0, energy, 1))
    chosen = list(chosen)
    if not chosen:
        chosen.append(int((gram @ (1 / norms) / norms).argmin()))
    # The cosine of each token with the chosen one that is most like it.
    nearest = np.full(tokens.num_tokens, -np.inf, np.float32)
    nearest[chosen] = np.inf
    for step in range(min(k, GREEDY_STEPS)):
        if step == len(chosen):
            chosen.append(int(nearest.argmin()))
        pivot = chosen[step]
        nearest = np.maximum(nearest, gram[pivot] / (norms * norms[pivot]))
        nearest[pivot] = np.inf
    return _with_rest(chosen, nearest, k)


def _with_rest(chosen: list[int], rank: NDArray[np.float32], k: int) -> torch.Tensor:
    """``k`` indices: those that are chosen, and after them others of the lowest rank."""
    rest = np.argsort(rank, kind="stable")[: max(k - len(chosen), 0)]
    return torch.tensor([*chosen[:k], *rest.tolist()], dtype=torch.int64)


SELECTORS: dict[str, Selector] = {
    "span": span,
    "attention": attention,
    "diversity": diversity,
    "hybrid": hybrid,
    "uniform": uniform,
    "random": random,
}
# These cannot do without a tower's attention.
BY_ATTENTION = ("attention", "hybrid")
