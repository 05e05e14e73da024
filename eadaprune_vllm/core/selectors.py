"""Selectors: which k of the N visual tokens of an image are kept.

A selector is a function ``(tokens, k) -> indices`` that returns k distinct int64 indices in any order. To add one,
write the function, and add it to ``SELECTORS`` and its name to ``options.SELECTOR_NAMES``. Selectors must be
deterministic; of equal tokens the lower index comes first. Their cost must be bounded: clients choose k, and each step
of a greedy selector looks at every token.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

# Tokens that are chosen one by one. The rest of a larger budget is chosen at once, by its rank after these steps.
GREEDY_STEPS = 1024
# A residual below this share of a token's own energy counts as zero: float32 rounding errors stay below half of it.
_ROUNDING = 64 * np.finfo(np.float32).eps
_precision = threading.Lock()


def _choose(
    gram: NDArray[np.float32],
    factor: NDArray[np.float32],
    residual: NDArray[np.float32],
    rounding: NDArray[np.float32],
    chosen: NDArray[np.int64],
    gains: NDArray[np.float64],
    count: int,
    k: int,
    energy: float,
) -> int:
    """``PivotedCholesky.choose`` on its arrays, of which ``count`` entries are filled; returns the new count."""
    spanned = gains[:count].sum()
    for step in range(count, len(factor)):
        if step >= k and spanned >= energy:
            return step
        pivot = residual.argmax()
        if residual[pivot] <= rounding[pivot]:
            for token in range(len(residual)):
                if -np.inf < residual[token] <= rounding[token]:
                    residual[token] = 0
            pivot = residual.argmax()
            if residual[pivot] <= 0:
                return step
        row = factor[step]
        for token in range(len(residual)):
            row[token] = gram[pivot, token]
        for other in range(step):
            share, before = factor[other, pivot], factor[other]
            for token in range(len(residual)):
                row[token] -= share * before[token]
        scale = 1 / np.sqrt(residual[pivot])
        gain = 0.0
        for token in range(len(residual)):
            row[token] *= scale
            square = row[token] * row[token]
            residual[token] -= square
            gain += square
        residual[pivot] = -np.inf
        chosen[step], gains[step] = pivot, gain
        spanned += gain
    return len(factor)


@functools.cache
def _compiled() -> Callable[..., int]:
    """``_choose`` in machine code that holds no GIL, from numba's cache if there is a folder for it."""
    # Imported late: vLLM's CPU worker looks into all loaded modules when it starts, and fails over llvmlite's.
    import numba

    try:
        compiled: Callable[..., int] = numba.njit(nogil=True, cache=True)(_choose)
    except RuntimeError:
        compiled = numba.njit(nogil=True)(_choose)
    return compiled


class PivotedCholesky:
    """Greedy column subset selection by pivoted Cholesky: the next token is the one with the most energy outside the
    span of the chosen ones. It can be continued.

    Args:
        gram: ``[N, N]`` float32, ``X X^T``.

    Attributes:
        total: ``||X||_F^2``; may be infinite or NaN.
        chosen: tokens, in the order in which they were chosen.
        gains: energy that each chosen token adds to the span; the first j sum to ``||P X||_F^2``.
        residual: ``[N]`` float32, squared norm of each token's part outside the span; minus infinity for chosen tokens.
            The others sum to ``||X - P X||_F^2``.
    """

    def __init__(self, gram: NDArray[np.float32]) -> None:
        self.residual = gram.diagonal().copy()
        self.total = float(self.residual.sum(dtype=np.float64))
        steps = min(len(gram), GREEDY_STEPS)
        self._chosen, self._gains, self._count = np.zeros(steps, np.int64), np.zeros(steps), 0
        self._gram = gram
        self._rounding = self.residual * np.float32(_ROUNDING)
        self._factor = np.empty((steps, len(gram)), np.float32)

    @property
    def chosen(self) -> list[int]:
        found: list[int] = self._chosen[: self._count].tolist()
        return found

    @property
    def gains(self) -> list[float]:
        found: list[float] = self._gains[: self._count].tolist()
        return found

    def choose(self, k: int, energy: float = 0.0) -> None:
        """Continue until ``k`` tokens are chosen and their span holds ``energy``. Stops after ``GREEDY_STEPS`` tokens,
        or if no token has energy outside the span."""
        self._count = _compiled()(
            self._gram, self._factor, self.residual, self._rounding, self._chosen, self._gains, self._count, k, energy
        )

    def energy(self, k: int) -> float | None:
        """The energy in the span of the first ``k`` tokens; None if it is not known, because fewer were chosen one by
        one and there is energy outside their span."""
        is_unknown = k > len(self.chosen) and self.residual.max() > 0
        return None if is_unknown else min(sum(self.gains[:k]), self.total)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image, or of a part of it.

    Attributes:
        features: ``[N, D]``, in the order of the prompt.
        attention: ``[N]`` float32, the attention that each token receives in the last used layer of the vision tower;
            None if it was not captured.
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

    def smaller_gram(self, dtype: torch.dtype) -> torch.Tensor:
        """``X X^T`` or ``X^T X``, whichever is smaller: both have the same nonzero eigenvalues.

        Args:
            dtype: of the product, float32 or float64.
        """
        if self.num_tokens > self.features.shape[1]:
            return _gram(self.features.T.to(dtype))
        return self.token_gram if dtype == torch.float32 else _gram(self.features.to(dtype))

    @property
    def token_gram_numpy(self) -> NDArray[np.float32]:
        """``token_gram`` in NumPy: a selector's step is little work on vectors, for which torch takes ten times as
        long, and a GPU longer."""
        gram: NDArray[np.float32] = self.token_gram.cpu().numpy()
        return gram

    @cached_property
    def pivots(self) -> PivotedCholesky:
        """Shared by budgets by span and the selector ``span``."""
        return PivotedCholesky(self.token_gram_numpy)

    def take(self, indices: torch.Tensor) -> "VisualTokens":
        """The tokens at these indices ``[n]`` int64."""
        attention = self.attention
        return VisualTokens(self.features[indices], None if attention is None else attention[indices])


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """``rows rows^T`` in full precision. ``VLLM_FLOAT32_MATMUL_PRECISION`` may allow TF32 or bfloat16 for the model.

    Torch has this setting per process, not per thread: products of other threads are meanwhile more exact than needed.
    The lock keeps two calls from restoring each other's setting.
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
    """The k tokens that receive the most attention (FasterVLM's score, arXiv 2412.01818)."""
    assert tokens.attention is not None, "prune falls back to span"
    return torch.sort(tokens.attention, descending=True, stable=True).indices[:k]


def span(tokens: VisualTokens, k: int) -> torch.Tensor:
    """The tokens that ``PivotedCholesky`` chooses. After ``GREEDY_STEPS`` those with the largest residual, and once
    there is no energy outside the span the first in raster order."""
    pivots = tokens.pivots
    pivots.choose(k)
    return _with_rest(pivots.chosen, -pivots.residual, k)


def diversity(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Greedy max-min distance, as in DivPrune (arXiv 2503.02175): the next token is the one whose largest cosine
    similarity to a chosen token is smallest. The first is the one least similar to all tokens on average."""
    return _diverse(tokens, k, [])


def hybrid(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Half of the tokens by ``attention``, and from these on by ``diversity``, as in VisPruner (arXiv 2412.01818)."""
    return _diverse(tokens, k, attention(tokens, (k + 1) // 2).tolist())


def uniform(tokens: VisualTokens, k: int) -> torch.Tensor:
    """Every N/k-th token in raster order."""
    return (torch.arange(k, dtype=torch.int64) * 2 + 1) * tokens.num_tokens // (2 * max(k, 1))


def random(tokens: VisualTokens, k: int) -> torch.Tensor:
    """The first k of a permutation that depends on N only, so that the result for an image is reproducible."""
    return torch.from_numpy(np.random.default_rng(0).permutation(tokens.num_tokens)[:k]).long()


def _diverse(tokens: VisualTokens, k: int, chosen: list[int]) -> torch.Tensor:
    """``chosen``, continued by greedy max-min distance."""
    gram = tokens.token_gram_numpy
    energy = gram.diagonal()
    norms = np.sqrt(np.where(energy > 0, energy, 1))
    chosen = list(chosen)
    if not chosen:
        chosen.append(int((gram @ (1 / norms) / norms).argmin()))
    # The largest cosine similarity of each token to a chosen one.
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
    """``k`` indices: the chosen tokens, then others by ascending rank."""
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
# Selectors that need the attention of the vision tower.
BY_ATTENTION = ("attention", "hybrid")
