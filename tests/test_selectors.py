"""Which tokens stay, against obvious references."""

import pytest
import torch

from eadaprune_vllm.core.selectors import SELECTORS, VisualTokens, attention, diversity, hybrid, span, uniform


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


def test_span_can_be_continued() -> None:
    found = tokens(torch.randn(40, 50))
    at_once = span(VisualTokens(found.features, None), 30).tolist()
    assert [span(found, k).tolist() for k in (5, 30, 12)] == [at_once[:5], at_once, at_once[:12]]


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


def most_alike(features: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """``[N]``: for each row the cosine of the most similar of the chosen rows, in float64."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return (unit @ unit[chosen].T).max(1).values


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_diversity_picks_the_token_least_like_any_chosen(shape: tuple[int, int]) -> None:
    features = torch.randn(shape)
    picks = diversity(tokens(features), 12).tolist()
    for step in range(1, 12):
        alike = most_alike(features, picks[:step])
        assert alike[picks[step]] == pytest.approx(float(alike.min()), abs=1e-5)


def test_diversity_ignores_norms_and_handles_zeros() -> None:
    features = torch.tensor([[1.0, 0], [100, 1], [0, 0], [0, 1], [-1, 0]])
    assert diversity(tokens(features), 3).tolist() == [4, 0, 2]


def test_hybrid_is_half_attention_and_then_the_least_alike() -> None:
    found = tokens(torch.randn(30, 40))
    picks = hybrid(found, 9).tolist()
    assert picks[:5] == attention(found, 5).tolist()
    for step in range(5, 9):
        alike = most_alike(found.features, picks[:step])
        assert alike[picks[step]] == pytest.approx(float(alike.min()), abs=1e-5)


@pytest.mark.parametrize("selector", ["span", "diversity", "hybrid"])
def test_tokens_beyond_the_greedy_steps_are_chosen_at_once(selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that hold most, or are least alike, after the last step."""
    found = tokens(torch.randn(40, 20))
    one_by_one = SELECTORS[selector](found, 8).tolist()
    monkeypatch.setattr("eadaprune_vllm.core.selectors.GREEDY_STEPS", 8)
    found = VisualTokens(found.features, found.attention)  # of which nothing is chosen yet
    picks = SELECTORS[selector](found, 30).tolist()
    assert len({*picks}) == 30
    if selector == "hybrid":  # whose first half is by attention
        assert picks[:15] == attention(found, 15).tolist()
        return
    assert picks[:8] == one_by_one
    rest = torch.tensor([index for index in range(40) if index not in one_by_one])
    worth = residual_energies(found.features, one_by_one)
    if selector == "diversity":
        worth = -most_alike(found.features, one_by_one)
    assert picks[8:] == rest[worth[rest].argsort(descending=True)][:22].tolist()


def test_uniform_is_evenly_spaced() -> None:
    assert uniform(tokens(torch.zeros(12, 2)), 4).tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_every_selector_returns_k_distinct_tokens(selector: str, num_tokens: int) -> None:
    found = tokens(torch.randn(num_tokens, 16))
    for k in range(num_tokens + 1):  # none, where max_tokens leaves a tile none
        picks = SELECTORS[selector](found, k)
        assert picks.dtype == torch.int64
        assert len(set(picks.tolist()) & set(range(num_tokens))) == k


def test_gram_matrices_are_never_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever vLLM's own may be in; which they are again afterwards."""
    seen: list[str] = []
    product = torch.Tensor.__matmul__

    def noted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return product(one, other)

    found = tokens(torch.randn(6, 4))
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in (torch.float32, torch.float64):
            found.smaller_gram(dtype)
        span(found, 3)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert {*seen} == {"highest"}
