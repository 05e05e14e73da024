"""Decisions by LAPACK in float64: singular values for budgets, QR with column pivoting for which tokens stay."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr

from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import Encoding, PruneDecision

Array = NDArray[np.float64]
UNCERTAIN = 5e-6  # share of all energy that float32 may miss, up to the energy of 0.999
LESS = 2e-3  # share of all energy by which rounding, at near ties between tokens, may let their span hold less


def _by_singular_values(rows: Array) -> Array:
    return np.asarray(np.linalg.svd(rows, compute_uv=False) ** 2)


def _by_pivots(rows: Array) -> Array:
    (factor, _) = qr(rows.T, mode="r", pivoting=True)
    return np.asarray((factor**2).sum(1))


def _shares(energies: Array, num_tokens: int) -> Array:
    """What the first k of so many tokens hold, ``[num_tokens]``."""
    total = energies.sum()
    held = (energies.cumsum() / total if total else np.ones(1))[:num_tokens]
    return np.pad(held, (0, num_tokens - len(held)), constant_values=1.0)


def _smallest(shares: Array, energy: float) -> int:
    reached = shares >= energy
    return int(reached.argmax()) + 1 if reached.any() else len(shares)


def check(encoding: Encoding, options: PruneOptions, kept: PruneDecision) -> None:
    """Raises:
    AssertionError: if a decision is another than LAPACK's, but for what rounding decides.
    """
    parts = [(members.numpy(), tokens.features.double().numpy()) for members, tokens in encoding.parts(options.scope)]
    num_tokens = sum(len(members) for members, _ in parts)
    energies = _by_singular_values if encoding.budget == "spectrum" else _by_pivots
    shares = [_shares(energies(rows), len(rows)) for _, rows in parts]

    def budget(uncertain: float) -> int:
        needed, most = num_tokens, min(options.max_tokens or num_tokens, num_tokens)
        if not options.enabled:
            return num_tokens
        if options.energy < 1:
            due = options.energy + min(1e-6, (1 - options.energy) / 1000) + uncertain
            needed = sum(_smallest(share, due) for share in shares)
        floor = max(options.min_tokens, math.ceil(options.min_share * num_tokens))
        return min(max(needed, min(floor, most)), most)

    exact = encoding.budget == "spectrum" and options.energy > 0.999
    uncertain = 0.0 if exact else UNCERTAIN
    assert budget(-uncertain) <= len(kept) <= budget(uncertain)
    if kept.selector != "span" or len(kept) == num_tokens:
        return
    for members, rows in parts:
        chosen = np.isin(members, kept.indices.numpy())
        if not chosen.any():  # a limit of tokens may leave a tile none
            continue
        basis, _ = np.linalg.qr(rows[chosen].T)
        total = (rows**2).sum()
        held = ((rows @ basis) ** 2).sum() / total if total else 1.0
        assert held >= _shares(_by_pivots(rows), len(rows))[chosen.sum() - 1] - LESS
