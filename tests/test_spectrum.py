"""The budget against a float64 SVD."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from shared import Reference

from eadaprune_vllm.core.budget import TIE_TOLERANCE
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.core.prune import Encoding
from eadaprune_vllm.core.selectors import VisualTokens, span
from eadaprune_vllm.core.spectrum import FLOAT32_UP_TO, Spectrum, span_spectrum
from eadaprune_vllm.errors import NonFiniteFeaturesError

ENERGIES = (0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
NEAR_ONE = (0.9997, 0.9999, 0.99999, 0.999999)
# By what share of all energy a budget up to ``FLOAT32_UP_TO`` may miss. docs/design.md says so, too.
UNCERTAIN = 5e-6
KINDS = (
    "gaussian",
    "low rank",
    "power law",
    "dominant mean",
    "constant",
    "fast decay",
    "low rank and noise",
    "outliers",
)
SHAPES = ((576, 1024), (729, 300), (200, 2000))


def spectrum(features: torch.Tensor) -> Spectrum:
    return Spectrum.of([VisualTokens(features, None)])


def shares(features: torch.Tensor) -> NDArray[np.float64]:
    """What the largest k squares of singular values hold of all, by numpy in float64."""
    squares = np.linalg.svd(features.double().numpy(), compute_uv=False) ** 2
    held: NDArray[np.float64] = np.cumsum(squares) / squares.sum()
    return held


def smallest(held: NDArray[np.float64], energy: float, tie: float | None = None) -> int:
    """The smallest k that holds a threshold and so much more, by default as much as rounds ties up."""
    reached = held >= energy + (min(1e-6, (1 - energy) / 1000) if tie is None else tie)
    return int(np.argmax(reached)) + 1 if reached.any() else len(held)


def reference_budget(features: torch.Tensor, energy: float) -> int:
    return smallest(shares(features), energy)


def matrix(kind: str, num_tokens: int, width: int) -> torch.Tensor:
    gaussian = torch.randn(num_tokens, width)
    if kind == "low rank":
        rank = min(5, num_tokens, width)
        return torch.randn(num_tokens, rank) @ torch.randn(rank, width)
    if kind == "power law":
        return gaussian * torch.arange(1, width + 1) ** -1.0
    if kind == "dominant mean":
        return gaussian + 100 * torch.randn(width)
    if kind == "constant":
        return gaussian + 10
    if kind == "fast decay":
        return gaussian * torch.arange(1, width + 1) ** -2.0
    if kind == "low rank and noise":
        return gaussian / 100 + matrix("low rank", num_tokens, width) + 30
    if kind == "outliers":  # a token and a channel, as towers have them
        gaussian[num_tokens // 2] *= 50
        gaussian[:, width // 3] += 300
    return gaussian


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (40, 64), (64, 64), (96, 32), (5, 1)])
def test_budget_equals_that_of_a_float64_svd(kind: str, shape: tuple[int, int]) -> None:
    for _ in range(15):
        features = matrix(kind, *shape)
        for energy in ENERGIES:
            assert spectrum(features).budget(energy) == reference_budget(features, energy)


def check(features: torch.Tensor) -> None:
    """As the engine decides: to the token near 1, and within what is uncertain below."""
    held = shares(features)
    encoding = Encoding(VisualTokens(features, None), Layout.whole(1, len(features)))
    for energy in NEAR_ONE:
        assert encoding.spectrum("tile", energy).budget(energy) == smallest(held, energy)
    for energy in ENERGIES:
        k = encoding.spectrum("tile", energy).budget(energy)
        assert smallest(held, energy, -UNCERTAIN) <= k <= smallest(held, energy, UNCERTAIN)
    found = encoding.spectrum("tile", FLOAT32_UP_TO).cumulative[: len(held)].numpy()
    assert np.abs(found - held).max() < UNCERTAIN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_budgets_of_real_sizes(kind: str, shape: tuple[int, int]) -> None:
    check(matrix(kind, *shape))


@pytest.mark.parametrize("name", ["astronaut", "page", "flat"])
def test_budgets_of_pictures(reference: Reference, images: dict[str, Image.Image], name: str) -> None:
    check(reference.encode(reference.inputs(images[name])).tokens.features)


def test_bfloat16_features_are_accumulated_in_float32() -> None:
    features = matrix("power law", 200, 300).bfloat16()
    found = Spectrum.of([VisualTokens(features, None)], torch.float32)
    assert found.budget(0.99) == reference_budget(features, 0.99)


def test_budget_is_monotone_in_energy() -> None:
    found = spectrum(matrix("power law", 100, 80))
    budgets = [found.budget(energy) for energy in np.linspace(0.01, 1, 500)]
    assert budgets == sorted(budgets)
    assert budgets[-1] == 100


def test_budget_is_invariant_to_rotation_row_order_and_scale() -> None:
    features = matrix("power law", 60, 90)
    rotation, _ = torch.linalg.qr(torch.randn(90, 90))
    for energy in ENERGIES:
        k = spectrum(features).budget(energy)
        assert spectrum(features @ rotation).budget(energy) == k
        assert spectrum(features[torch.randperm(60)]).budget(energy) == k
        assert spectrum(features * 1e-3).budget(energy) == k
        assert spectrum(features * 1e3).budget(energy) == k


def test_ties_round_up() -> None:
    # Four equal singular values: three hold 0.75 of the energy exactly.
    features = torch.eye(4)
    assert spectrum(features).budget(0.75) == 4
    assert spectrum(features).budget(0.75 - 2 * TIE_TOLERANCE) == 3


def test_energy_one_keeps_every_token_whatever_the_rank() -> None:
    assert spectrum(matrix("low rank", 50, 60)).budget(1.0) == 50


def test_energy_just_below_one_stays_within_the_tokens() -> None:
    assert spectrum(torch.randn(5, 8)).budget(1 - 1e-12) == 5


def test_zero_matrix_needs_one_token() -> None:
    found = spectrum(torch.zeros(30, 20))
    assert found.budget(0.99) == 1
    assert found.budget(1.0) == 30
    assert found.energy_at(1) == 1.0


def test_energy_at_is_the_share_of_the_top_k() -> None:
    features = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert spectrum(features).energy_at(1) == pytest.approx(4 / 6)
    assert spectrum(features).energy_at(3) == 1.0
    assert spectrum(features).energy_at(99) == 1.0


def test_parts_of_several_sizes_have_the_spectra_they_have_alone() -> None:
    """Those of one size are computed together, and one of zeros among them."""
    shapes = [(20, 30), (40, 30), (12, 30), (20, 30), (30, 30)]
    features = [matrix("power law", *shape) for shape in shapes]
    features[3] *= 0
    parts = [VisualTokens(each, None) for each in features]
    together = Spectrum.of(parts)
    for energy in ENERGIES:
        alone = [Spectrum.of([part]).budget(energy) for part in parts]
        assert together.allocate(together.budget(energy)) == alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_non_finite_features_are_refused(bad: float) -> None:
    features = torch.randn(10, 12)
    features[3, 4] = bad
    with pytest.raises(NonFiniteFeaturesError, match="NaN or infinite"):
        spectrum(features)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_a_budget_by_span_chooses_hold_the_threshold_themselves(kind: str) -> None:
    """And one fewer of them would not."""
    features = matrix(kind, 60, 90)
    tokens = VisualTokens(features, None)
    for energy in ENERGIES:
        k = span_spectrum([tokens], energy, 1).budget(energy)
        assert k >= spectrum(features).budget(energy)
        chosen = span(tokens, k)
        for fewer, reached in ((chosen, True), (chosen[:-1], False)):
            rows = features[fewer].double().T
            left = features.double().T - rows @ torch.linalg.pinv(rows) @ features.double().T
            held = 1 - float(left.square().sum() / features.double().square().sum())
            assert (held >= energy) is reached


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_a_budget_by_span_chooses_hold_thresholds_near_one(kind: str) -> None:
    """But for what float32 cannot tell from nothing."""
    features = matrix(kind, 200, 300)
    rows = features.double()
    for energy in NEAR_ONE:
        tokens = VisualTokens(features, None)
        basis, _ = torch.linalg.qr(rows[span(tokens, span_spectrum([tokens], energy, 1).budget(energy))].T)
        assert (rows @ basis).square().sum() / rows.square().sum() >= energy - 1e-5


def test_budget_by_span_chooses_no_more_tokens_than_needed() -> None:
    features = matrix("power law", 100, 120)
    tokens = VisualTokens(features, None)
    found = span_spectrum([tokens], 0.8, 1)
    assert len(tokens.pivots.chosen) == found.budget(0.8) < 50
    whole = span_spectrum([VisualTokens(features, None)], 1.0, 1)
    assert whole.budget(0.8) == found.budget(0.8)
    assert whole.budget(1.0) == found.budget(1.0) == 100
    assert span_spectrum([tokens], 0.8, 70).allocate(70) == [70]
    assert len(tokens.pivots.chosen) == 70


def test_a_budget_by_span_of_more_tokens_than_are_chosen_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features = matrix("power law", 100, 120)
    exact = span_spectrum([VisualTokens(features, None)], 1.0, 1)
    monkeypatch.setattr("eadaprune_vllm.core.selectors.GREEDY_STEPS", 10)
    found = span_spectrum([VisualTokens(features, None)], 1.0, 1)
    assert found.budget(0.3) == exact.budget(0.3) < 10
    assert 10 < exact.budget(0.95) <= found.budget(0.95) < 100


def test_each_part_reaches_the_threshold_by_span() -> None:
    features = [matrix(kind, 30, 40) for kind in ("gaussian", "low rank", "power law")]
    features.append(torch.zeros(10, 40))
    together = span_spectrum([VisualTokens(each, None) for each in features], 0.9, 1)
    alone = [span_spectrum([VisualTokens(each, None)], 0.9, 1).budget(0.9) for each in features]
    assert together.allocate(together.budget(0.9)) == alone
    assert alone[-1] == 1
    assert sum(together.allocate(60)) == 60


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_non_finite_features_have_no_budget_by_span(bad: float) -> None:
    features = torch.randn(10, 12)
    features[3, 4] = bad
    with pytest.raises(NonFiniteFeaturesError, match="NaN or infinite"):
        span_spectrum([VisualTokens(features, None)], 0.9, 1)
