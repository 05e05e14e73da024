"""The decision about one image: whole, in parts, and with newlines."""

import pytest
import torch

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import WINDOW, Encoding, prune
from eadaprune_vllm.core.selectors import SELECTORS, VisualTokens
from eadaprune_vllm.core.spectrum import Spectrum
from eadaprune_vllm.errors import NonFiniteFeaturesError


def tokens(num_tokens: int, width: int, decay: float = 0.75) -> VisualTokens:
    features = torch.randn(num_tokens, width) * torch.arange(1, width + 1.0) ** -decay
    return VisualTokens(features, torch.rand(num_tokens))


def image(num_tokens: int, width: int = 40) -> Encoding:
    return Encoding(tokens(num_tokens, width), Layout.whole(1, num_tokens))


def tiles(*decays: float, length: int = 30) -> Encoding:
    """Tiles of different density, their tokens interleaved."""
    parts = [tokens(length, 40, decay) for decay in decays]
    features = torch.stack([part.features for part in parts], 1).flatten(0, 1)
    found = VisualTokens(features, torch.rand(len(features)))
    layout = Layout(torch.arange(len(parts)).repeat(length), ((length, len(parts)),))
    return Encoding(found, layout)


def counts(encoding: Encoding, **options: object) -> list[int]:
    """Tokens kept of each part."""
    kept = prune(encoding, PruneOptions.model_validate(options))
    return torch.bincount(encoding.layout.part[kept.indices], minlength=len(encoding.parts("tile"))).tolist()


@pytest.mark.parametrize("selector", SELECTORS)
def test_kept_is_in_raster_order_and_within_the_clamps(selector: str) -> None:
    found = image(60)
    unclamped = len(prune(found, PruneOptions(energy=0.9, min_tokens=1, selector=selector)))
    assert 4 < unclamped < 30
    bounds = ((1, None, None), (30, None, "min_tokens"), (1, 4, "max_tokens"), (30, 40, "min_tokens"))
    for low, high, bound in (*bounds, (100, None, "min_tokens")):
        kept = prune(found, PruneOptions(energy=0.9, min_tokens=low, max_tokens=high, selector=selector))
        assert len(kept) == min(max(unclamped, low), high or 60, 60)
        assert kept.bound == bound
        assert kept.indices.tolist() == kept.placeholders.tolist() == sorted(set(kept.indices.tolist()))


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"enabled": False, "energy": 0.5, "max_tokens": 20}])
@pytest.mark.parametrize("scope", ["tile", "image"])
def test_null_case_keeps_every_token(options: dict[str, object], scope: str) -> None:
    kept = prune(tiles(0.5, 2, length=15), PruneOptions.model_validate(options | {"scope": scope}))
    assert kept.indices.tolist() == list(range(30))
    assert (kept.spectral_energy, kept.span_energy) == (1.0, 1.0)


def test_keeping_every_token_respects_the_ceiling() -> None:
    """So that a bound on tokens holds at any threshold, and min = max is a fixed budget."""
    found = image(30, 8)
    kept = prune(found, PruneOptions(energy=1.0, min_tokens=1, max_tokens=5))
    assert len(kept) == 5
    assert kept.spectral_energy == pytest.approx(Spectrum.of([found.tokens]).energy_at(5))


def test_without_attention_the_selector_is_span() -> None:
    known = image(50)
    unknown = Encoding(VisualTokens(known.tokens.features, None), Layout.whole(1, 50))
    kept = prune(unknown, PruneOptions(energy=0.9, selector="attention"))
    assert kept.selector == "span"
    assert kept.indices.tolist() == prune(known, PruneOptions(energy=0.9, selector="span")).indices.tolist()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_each_part_has_the_budget_it_would_have_alone(energy: float) -> None:
    found = tiles(0.25, 0.75, 2)
    alone = [Spectrum.of([part]).budget(energy) for _, part in found.parts("tile")]
    assert len(set(alone)) == 3
    assert counts(found, energy=energy, min_tokens=1) == alone
    # One budget for all of it is another matter.
    together = Spectrum.of([found.tokens]).budget(energy)
    assert sum(counts(found, energy=energy, min_tokens=1, scope="image")) == together != sum(alone)


def test_bounds_on_all_parts_move_the_threshold_common_to_them() -> None:
    found = tiles(0.25, 0.75, 2)
    spectra = [Spectrum.of([part]) for _, part in found.parts("tile")]
    for budget in range(1, 91):
        of_each = counts(found, energy=0.9, min_tokens=budget, max_tokens=budget)
        assert sum(of_each) == budget
        # No part is short of an energy that another one's last token was not needed for.
        reached = [spectrum.energy_at(k) if k else 0 for spectrum, k in zip(spectra, of_each, strict=True)]
        needless = [spectrum.energy_at(k - 1) if k > 1 else 0 for spectrum, k in zip(spectra, of_each, strict=True)]
        assert max(needless) <= min(reached) + 1e-6


def test_the_energy_reported_is_that_of_all_parts() -> None:
    found = tiles(0.25, 2)
    kept = prune(found, PruneOptions(energy=0.8, min_tokens=1))
    spectra = [Spectrum.of([part]) for _, part in found.parts("tile")]
    totals = [float(part.features.square().sum()) for _, part in found.parts("tile")]
    of_each = counts(found, energy=0.8, min_tokens=1)
    held = sum(total * spectrum.energy_at(k) for total, spectrum, k in zip(totals, spectra, of_each, strict=True))
    assert kept.spectral_energy == pytest.approx(held / sum(totals), rel=1e-5)


def test_a_part_of_many_tokens_is_decided_on_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal runs of tokens, none across parts, each with the budget and the tokens it would have alone."""
    monkeypatch.setitem(WINDOW, "tile", 12)
    found = Encoding(tokens(40, 30), Layout(torch.tensor([0] * 30 + [1] * 10), ((5, 6), (2, 5))))
    options = PruneOptions(energy=0.9, min_tokens=1)
    runs = [range(0, 10), range(10, 20), range(20, 30), range(30, 40)]
    assert [indices.tolist() for indices, _ in found.parts("tile")] == [[*run] for run in runs]
    alone = [prune(Encoding(part, Layout.whole(1, 10)), options).indices for _, part in found.parts("tile")]
    assert prune(found, options).indices.tolist() == [
        run.start + index for run, kept in zip(runs, alone, strict=True) for index in kept.tolist()
    ]
    assert len(found.parts("image")) == 1


def test_a_part_of_zeros_needs_one_token() -> None:
    found = tiles(0.5, 0.5)
    found.tokens.features[found.layout.part == 1] = 0
    assert counts(found, energy=0.99, min_tokens=1)[1] == 1


def test_a_newline_stays_while_its_line_keeps_a_token() -> None:
    """Two tokens without a line, then a line of three tokens, a separator, and a line of three again."""
    mask = torch.zeros(11, dtype=torch.bool)
    mask[torch.tensor([5, 6, 10])] = True
    line = torch.tensor([-1, -1, 0, 0, 0, 2, 2, 2])
    scores = torch.zeros(8)
    scores[torch.tensor([1, 3])] = 1.0
    found = VisualTokens(torch.randn(8, 4), scores)
    encoding = Encoding(found, Layout(torch.zeros(8).long(), ((1, 8),), Newlines(mask, line)))

    kept = prune(encoding, PruneOptions(min_tokens=2, max_tokens=2, selector="attention"))
    assert kept.unpruned == 11
    assert kept.indices.tolist() == [1, 3]
    assert kept.placeholders.tolist() == [1, 3, 5, 6]
    assert kept.newlines == 2
    assert len(kept) == 2  # newlines are not in the budget

    full = prune(encoding, PruneOptions(energy=1.0))
    assert full.placeholders.tolist() == list(range(11))
    assert full.newlines == 3


def test_position_slack_is_mrope_span_minus_tokens() -> None:
    """Unless there are more tokens than positions."""
    found = tokens(30, 8)
    for mrope_span, slack in ((10, 5), (3, 0), (0, 0)):
        encoding = Encoding(found, Layout(torch.zeros(30).long(), ((5, 6),), mrope_span=mrope_span))
        assert prune(encoding, PruneOptions(min_tokens=5, max_tokens=5)).position_slack == slack


def test_if_there_are_fewer_tokens_than_parts_the_largest_parts_get_them() -> None:
    found = tiles(*[0.75] * 24)
    found.tokens.features[found.layout.part >= 16] *= 10
    kept = counts(found, energy=0.9, min_tokens=1, max_tokens=8)
    assert kept == [0] * 16 + [1] * 8


@pytest.mark.parametrize("scope", ["tile", "image"])
def test_nan_is_refused_before_anything_is_decided(scope: str) -> None:
    found = tiles(0.5, 0.5)
    found.tokens.features[3, 3] = torch.nan
    for energy in (0.5, 1.0):
        with pytest.raises(NonFiniteFeaturesError):
            prune(found, PruneOptions.model_validate({"energy": energy, "scope": scope}))
