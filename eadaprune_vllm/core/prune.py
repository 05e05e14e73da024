"""The pruning decision about one image: the spectrum gives the number of kept tokens, the selector chooses them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from eadaprune_vllm.core.budget import clamp_budget
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.core.options import Bound, Budget, PruneOptions
from eadaprune_vllm.core.selectors import BY_ATTENTION, SELECTORS, VisualTokens
from eadaprune_vllm.core.spectrum import Spectrum, precision, span_spectrum, spectra
from eadaprune_vllm.errors import NonFiniteFeaturesError

# Maximum number of tokens with one spectrum and one selection, by scope: their cost is cubic and quadratic in it.
WINDOW = {"tile": 1024, "image": 4096}


@dataclass(frozen=True)
class Encoding:
    """One encoded image or video.

    Attributes:
        tokens: whose features budget and selection use.
        layout: of the tokens.
        budget: the server's option ``budget``.
    """

    tokens: VisualTokens
    layout: Layout
    budget: Budget = "spectrum"
    _parts: dict[str, list[tuple[torch.Tensor, VisualTokens]]] = field(default_factory=dict, repr=False)
    _spectra: dict[tuple[str, torch.dtype], Spectrum] = field(default_factory=dict, repr=False)

    def parts(self, scope: str) -> list[tuple[torch.Tensor, VisualTokens]]:
        """The parts that have a budget each, by the option ``scope``. Parts with too many tokens are split into
        windows: runs of equal length, in the order of the prompt.

        Returns:
            Of each part the indices of its tokens ``[n]`` int64, ascending, and the tokens.
        """
        if scope not in self._parts:
            part = self.layout.part if scope == "tile" else torch.zeros_like(self.layout.part)
            members = [(part == number).nonzero()[:, 0] for number in torch.unique(part)]
            windows = [run for part in members for run in part.tensor_split(math.ceil(len(part) / WINDOW[scope]))]
            self._parts[scope] = [
                (indices, self.tokens if len(windows) == 1 else self.tokens.take(indices)) for indices in windows
            ]
        return self._parts[scope]

    def spectrum(self, scope: str, energy: float = 1.0, min_tokens: int = 1) -> Spectrum:
        """The spectrum, exact up to this threshold and up to this number of tokens.

        Raises:
            NonFiniteFeaturesError: if any feature is NaN or infinite.
        """
        parts = [tokens for _, tokens in self.parts(scope)]
        if self.budget == "span":
            return span_spectrum(parts, energy, min_tokens)
        key = scope, precision(energy)
        if key not in self._spectra:
            self._spectra[key] = Spectrum.of(parts, key[1])
        return self._spectra[key]


@dataclass(frozen=True)
class PruneDecision:
    """The decision. Placeholders, embeddings, positions, report and metrics are all derived from this one object.

    Attributes:
        indices: ``[k]`` int64, ascending, the kept tokens.
        placeholders: ``[p]`` int64, ascending, the kept placeholders: these tokens and their newlines.
        unpruned: number of placeholders without pruning.
        position_slack: upper bound of M-RoPE positions minus tokens.
        spectral_energy: share of the energy in the k largest squared singular values; None with budgets by span.
        span_energy: share of the energy in the span of the kept tokens, part by part; None if it is not known, as with
            selectors other than ``span``.
        bound: the option that determined k instead of the threshold, if one did.
        selector: the selector that was used.
        spectrum_seconds: time of the spectrum.
        select_seconds: time of the selection.
    """

    indices: torch.Tensor
    placeholders: torch.Tensor
    unpruned: int
    position_slack: int
    spectral_energy: float | None
    span_energy: float | None
    bound: Bound | None
    selector: str
    spectrum_seconds: float = 0
    select_seconds: float = 0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def newlines(self) -> int:
        """Number of kept placeholders that are newlines."""
        return len(self.placeholders) - len(self.indices)


def compute_spectra(encodings: Sequence[Encoding], options: Sequence[PruneOptions]) -> None:
    """Compute the spectra that ``prune`` needs with these options, in one batch."""
    needed = [
        (encoding, each.scope, precision(each.energy))
        for encoding, each in zip(encodings, options, strict=True)
        if encoding.budget == "spectrum" and _needs_spectrum(encoding.tokens, each)
    ]
    parts = [[tokens for _, tokens in encoding.parts(scope)] for encoding, scope, _ in needed]
    found = spectra(parts, [dtype for _, _, dtype in needed])
    for (encoding, scope, dtype), spectrum in zip(needed, found, strict=True):
        if spectrum:  # otherwise ``prune`` raises the error
            encoding._spectra[scope, dtype] = spectrum


def _needs_spectrum(tokens: VisualTokens, options: PruneOptions) -> bool:
    fewer = options.max_tokens is not None and options.max_tokens < tokens.num_tokens
    return options.enabled and (options.energy < 1 or fewer)


def _span_energy(parts: Sequence[VisualTokens], budgets: Sequence[int]) -> float | None:
    """The share of the energy of all parts that lies in the span of the tokens that ``span`` chose of each part."""
    total, spanned = 0.0, 0.0
    for tokens, budget in zip(parts, budgets, strict=True):
        energy = tokens.pivots.energy(budget)
        if energy is None:
            return None
        total, spanned = total + tokens.pivots.total, spanned + energy
    return spanned / total if total else 1.0


def finite(values: torch.Tensor) -> bool:
    """Whether all values are finite, by their sum: 20 times as fast as ``isfinite`` in 16 bit."""
    return bool(values.float().sum().isfinite())


def prune(encoding: Encoding, options: PruneOptions) -> PruneDecision:
    """Decide which tokens of an image to keep. A pure function of its arguments, except for the times.

    ``enabled=False`` keeps every token by the same code path. ``energy=1`` does so up to ``max_tokens``. Without
    attention weights, ``span`` replaces the selectors that need them.

    Raises:
        NonFiniteFeaturesError: if any feature is NaN or infinite.
    """
    tokens = encoding.tokens
    if not finite(tokens.features):
        raise NonFiniteFeaturesError("the vision tower produced NaN or infinite features for this image")
    k, budgets, seconds = tokens.num_tokens, None, 0.0
    spectral_energy: float | None = 1.0
    span_energy: float | None = 1.0
    bound: Bound | None = None
    if _needs_spectrum(tokens, options):
        spectrum = encoding.spectrum(options.scope, options.energy, options.floor(tokens.num_tokens))
        needed = spectrum.budget(options.energy)
        k = int(clamp_budget(needed, tokens.num_tokens, options))
        if k > needed:
            bound = "min_tokens" if options.floor(tokens.num_tokens) == options.min_tokens else "min_share"
        elif k < needed:
            bound = "max_tokens"
        budgets, seconds = spectrum.allocate(k), spectrum.seconds
    start = time.perf_counter()
    selector = "span" if tokens.attention is None and options.selector in BY_ATTENTION else options.selector
    if budgets is None or k == tokens.num_tokens:
        indices = torch.arange(k)
    else:
        members, parts = zip(*encoding.parts(options.scope), strict=True)
        chosen = [SELECTORS[selector](part, budget) for part, budget in zip(parts, budgets, strict=True)]
        indices = torch.cat([of_part[own] for of_part, own in zip(members, chosen, strict=True)]).sort().values
        spectral_energy = spectrum.energy_at(k) if encoding.budget == "spectrum" else None
        span_energy = _span_energy(parts, budgets) if selector == "span" else None
    assert len(indices) == k
    layout = encoding.layout
    return PruneDecision(
        indices,
        layout.placeholders(indices),
        len(layout.is_newline),
        max(layout.mrope_span - k, 0),
        spectral_energy,
        span_energy,
        bound,
        selector,
        seconds,
        time.perf_counter() - start,
    )
