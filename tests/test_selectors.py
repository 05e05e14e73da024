"""Which tokens stay, against obvious references."""

import pytest
import torch

from eadaprune_vllm.selectors import SELECTORS, VisualTokens, attention, span


def residual_energies(features: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """``[N]``: squared norm of each row outside the span of the chosen rows, by a float64 projection."""
    rows = features.double()
    if not chosen:
        return rows.square().sum(1)
    basis, _ = torch.linalg.qr(rows[chosen].T)
    residual: torch.Tensor = rows - rows @ basis @ basis.T
    return residual.square().sum(1)


def tokens(features: torch.Tensor) -> VisualTokens:
    return VisualTokens(features, torch.rand(len(features)))


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (40, 40)])
def test_span_picks_the_token_with_most_energy_outside_the_span(shape: tuple[int, int]) -> None:
    features = torch.randn(shape) * torch.arange(1, shape[1] + 1) ** -0.5
    picks = span(tokens(features), 12).tolist()
    for step, pick in enumerate(picks):
        residual = residual_energies(features, picks[:step])
        assert residual[pick] == pytest.approx(float(residual.max()), rel=1e-4)


def test_span_is_the_same_with_and_without_the_gram_matrix() -> None:
    """It is not made where it would be larger than the features; a zero column does not change the spectrum."""
    features = torch.randn(40, 30)
    assert span(tokens(features), 20).tolist() == span(tokens(torch.nn.functional.pad(features, (0, 30))), 20).tolist()


def test_span_beyond_the_rank_takes_the_first_tokens_left() -> None:
    features = torch.zeros(6, 4)
    features[2, 0], features[5, 1] = 1.0, 2.0
    assert span(tokens(features), 4).tolist() == [5, 2, 0, 1]


def test_span_of_duplicates_takes_one_of_each() -> None:
    features = torch.eye(3).repeat_interleave(4, 0)
    assert sorted(span(tokens(features), 3).tolist()) == [0, 4, 8]


def test_attention_takes_the_highest_scores_and_the_first_of_equals() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.2])
    assert attention(VisualTokens(torch.zeros(5, 2), scores), 3).tolist() == [1, 3, 2]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_every_selector_returns_k_distinct_tokens(selector: str, num_tokens: int) -> None:
    found = tokens(torch.randn(num_tokens, 16))
    for k in range(1, num_tokens + 1):
        picks = SELECTORS[selector](found, k)
        assert picks.dtype == torch.int64
        assert len(set(picks.tolist()) & set(range(num_tokens))) == k
