"""One image's pruning decision: the spectrum says how many tokens stay, the selector says which."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from eadaprune_vllm.core.budget import clamped
from eadaprune_vllm.core.options import Bound, Budget, PruneOptions
from eadaprune_vllm.core.selectors import BY_ATTENTION, SELECTORS, VisualTokens
from eadaprune_vllm.core.spectrum import Spectrum, precision, spanned, spectra
from eadaprune_vllm.errors import NonFiniteFeaturesError

# Most tokens with one spectrum and one selection, by scope: these take time with the square and the cube of them.
WINDOW = {"tile": 1024, "image": 4096}


@dataclass(frozen=True)
class Newlines:
    """Where a model puts newlines between the tokens of an image.

    Attributes:
        mask: ``[placeholders]`` bool, which of the unpruned prompt's placeholders are newlines.
        line: ``[N]`` int64, which of these newlines ends the line of the picture that a token is in; -1 for none.
            What ends no token's line separates pictures.
    """

    mask: torch.Tensor
    line: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Where the N tokens of one image or video are. They are in the order of the prompt; newlines are not among them.

    Attributes:
        part: ``[N]`` int64, the tile of the image, or temporal patch of the video, that a token comes from.
        grids: height and width of the grids that the tokens fill one after the other, each laid over the whole image,
            or over one temporal patch.
        newlines: if the model has any.
        extent: how many positions it takes at most where positions follow the grids (M-RoPE).
    """

    part: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    newlines: Newlines | None = None
    extent: int = 0

    @classmethod
    def whole(cls, height: int, width: int) -> Self:
        """Of an image that has one part and no newlines."""
        return cls(torch.zeros(height * width, dtype=torch.int64), ((height, width),))

    @property
    def is_newline(self) -> torch.Tensor:
        """``[placeholders]`` bool, which of the unpruned prompt's placeholders are newlines."""
        return self.newlines.mask if self.newlines else torch.zeros(len(self.part), dtype=torch.bool)

    def placeholders(self, indices: torch.Tensor) -> torch.Tensor:
        """Which placeholders stay with some of the tokens: these, separators, and the newlines of lines that keep any.

        Args:
            indices: ``[k]`` int64, of the tokens.

        Returns:
            ``[p]`` int64, ascending.
        """
        is_newline = self.is_newline
        stays = is_newline.clone()
        stays[(~is_newline).nonzero()[:, 0][indices]] = True
        if self.newlines:
            ends, line = torch.arange(int(is_newline.sum())), self.newlines.line
            stays[is_newline] = torch.isin(ends, line[indices]) | torch.isin(ends, line, invert=True)
        return stays.nonzero()[:, 0]


@dataclass(frozen=True)
class Encoding:
    """One image or video, encoded.

    Attributes:
        tokens: what budget and selection go by.
        layout: where they are.
        budget: the option of that name.
    """

    tokens: VisualTokens
    layout: Layout
    budget: Budget = "spectrum"
    _parts: dict[str, list[tuple[torch.Tensor, VisualTokens]]] = field(default_factory=dict, repr=False)
    _spectra: dict[tuple[str, torch.dtype], Spectrum] = field(default_factory=dict, repr=False)

    def parts(self, scope: str) -> list[tuple[torch.Tensor, VisualTokens]]:
        """What the option ``scope`` gives a budget of its own: the tokens of each part, after their indices ``[n]``
        int64, ascending. A part of too many tokens is cut into windows, equal runs in the order of the prompt."""
        if scope not in self._parts:
            part = self.layout.part if scope == "tile" else torch.zeros_like(self.layout.part)
            members = [(part == name).nonzero()[:, 0] for name in torch.unique(part)]
            windows = [own for all_ in members for own in all_.tensor_split(math.ceil(len(all_) / WINDOW[scope]))]
            self._parts[scope] = [
                (indices, self.tokens if len(windows) == 1 else self.tokens.take(indices)) for indices in windows
            ]
        return self._parts[scope]

    def spectrum(self, scope: str, energy: float = 1.0, least: int = 1) -> Spectrum:
        """What budgets go by, up to this threshold and number of tokens.

        Raises:
            NonFiniteFeaturesError: if any feature is NaN or infinite.
        """
        parts = [tokens for _, tokens in self.parts(scope)]
        if self.budget == "span":
            return spanned(parts, energy, least)
        key = scope, precision(energy)
        if key not in self._spectra:
            self._spectra[key] = Spectrum.of(parts, key[1])
        return self._spectra[key]


@dataclass(frozen=True)
class PruneDecision:
    """The one object that placeholders, rows, positions, report and metrics are made from.

    Attributes:
        indices: ``[k]`` int64, ascending, the tokens that stay.
        placeholders: ``[p]`` int64, ascending, the placeholders that stay: these tokens and their newlines.
        unpruned: how many placeholders there are unpruned.
        position_slack: by how much positions may run ahead of tokens at most (M-RoPE).
        spectral_energy: share of the energy that the k largest singular values hold; None if none were computed.
        span_energy: share of the energy in the span of these tokens, of each part in that of its own; None if it is not
            known, as of other selectors than ``span``.
        bound: the option that decided on k in the threshold's place.
        selector: what chose them.
        spectrum_seconds: time the spectrum took.
        select_seconds: time the selection took.
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
        """How many of the placeholders are newlines."""
        return len(self.placeholders) - len(self.indices)


def compute_spectra(encodings: Sequence[Encoding], options: Sequence[PruneOptions]) -> None:
    """Compute the spectra that ``prune`` goes by with these options, all at once."""
    wanting = [
        (encoding, each.scope, precision(each.energy))
        for encoding, each in zip(encodings, options, strict=True)
        if encoding.budget == "spectrum" and _by_threshold(encoding.tokens, each)
    ]
    parts = [[tokens for _, tokens in encoding.parts(scope)] for encoding, scope, _ in wanting]
    found = spectra(parts, [dtype for _, _, dtype in wanting])
    for (encoding, scope, dtype), spectrum in zip(wanting, found, strict=True):
        if spectrum:  # or else ``prune`` says why not
            encoding._spectra[scope, dtype] = spectrum


def _by_threshold(tokens: VisualTokens, options: PruneOptions) -> bool:
    fewer = options.max_tokens is not None and options.max_tokens < tokens.num_tokens
    return options.enabled and (options.energy < 1 or fewer)


def _span_energy(parts: Sequence[VisualTokens], budgets: Sequence[int]) -> float | None:
    """The share of all parts' energy in the spans of the tokens that ``span`` has chosen of each."""
    total, held = 0.0, 0.0
    for tokens, budget in zip(parts, budgets, strict=True):
        of_part = tokens.pivots.held(budget)
        if of_part is None:
            return None
        total, held = total + tokens.pivots.total, held + of_part
    return held / total if total else 1.0


def finite(rows: torch.Tensor) -> bool:
    """Whether all are, in a twentieth of the time that ``isfinite`` takes in 16 bit: otherwise their sum is not."""
    return bool(rows.float().sum().isfinite())


def prune(encoding: Encoding, options: PruneOptions) -> PruneDecision:
    """Decide which of an image's tokens to keep; a pure function of its arguments, the times aside.

    ``enabled=False`` keeps every token by the same path; ``energy=1`` does, up to ``max_tokens``. Where nothing is
    known about attention, ``span`` takes the place of selectors that go by it.

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
    if _by_threshold(tokens, options):
        spectrum = encoding.spectrum(options.scope, options.energy, options.floor(tokens.num_tokens))
        needed = spectrum.budget(options.energy)
        k = int(clamped(needed, tokens.num_tokens, options))
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
        indices = torch.cat([own[picks] for own, picks in zip(members, chosen, strict=True)]).sort().values
        spectral_energy = spectrum.energy_at(k) if encoding.budget == "spectrum" else None
        span_energy = _span_energy(parts, budgets) if selector == "span" else None
    assert len(indices) == k
    layout = encoding.layout
    return PruneDecision(
        indices,
        layout.placeholders(indices),
        len(layout.is_newline),
        max(layout.extent - k, 0),
        spectral_energy,
        span_energy,
        bound,
        selector,
        seconds,
        time.perf_counter() - start,
    )
