"""The engine's decisions: what is encoded together, and what fails alone. Of a model that is its own input."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import item

from eadaprune_vllm.core.budget import tokens_needed
from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import Encoding, PruneDecision, prune
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine import decide as module
from eadaprune_vllm.engine.decide import launch
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, DecisionResult


class Model(torch.nn.Module):
    """Rows are the item's own. ``batches`` notes what was encoded together, ``arranged`` what attention was given."""

    config = "of the model"
    eadaprune_captures_attention = True
    apart = False  # whether features are others than rows

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[str, list[int]]] = []

    def eadaprune_encode(self, modality: str, rows: Any, **_: Any) -> tuple[list[torch.Tensor], Any]:
        self.batches.append((modality, [len(each) for each in rows]))
        return list(rows), [each * 2 for each in rows] if self.apart else None

    def eadaprune_features(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :4]

    def eadaprune_layout(self, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        assert config == self.config
        assert len(data["rows"]) == num_placeholders
        if modality == "image":
            return Layout.whole(1, num_placeholders)
        mask = torch.arange(num_placeholders) == num_placeholders - 1
        tokens = num_placeholders - 1
        return Layout(torch.zeros(tokens).long(), ((1, tokens),), Newlines(mask, torch.zeros(tokens).long()))

    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        return attention.flip(0)


@pytest.fixture
def model() -> Model:
    return Model()


def asked(rows: torch.Tensor, modality: str = "image", explain: bool = False, **options: Any) -> DecisionRequest:
    chosen = PruneOptions.model_validate({"energy": 0.9, "min_tokens": 1} | options)
    return DecisionRequest(modality, item(modality, rows=rows), chosen.key, len(rows), explain)


def answered(
    model: Model,
    *questions: DecisionRequest,
    tp_mode: str = "weights",
    ranks: int = 1,
    answers: bool = True,
    **operator: Any,
) -> list[DecisionResponse]:
    multimodal = SimpleNamespace(mm_encoder_tp_mode=tp_mode, eadaprune=ServerOptions(**operator))
    config = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=multimodal),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    runner = SimpleNamespace(
        get_model=lambda: model, device=torch.device("cpu"), vllm_config=config, encoder_cudagraph_manager=None
    )
    return launch(runner, questions, answers)()


def as_decided(answer: DecisionResponse) -> DecisionResult:
    assert isinstance(answer, DecisionResult)
    return answer


def rows(count: int, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width) * torch.arange(1, width + 1.0) ** -1


def alone(features: torch.Tensor) -> PruneDecision:
    """The decision about an image by such features."""
    encoding = Encoding(VisualTokens(features, None), Layout.whole(1, len(features)))
    return prune(encoding, PruneOptions(energy=0.9, min_tokens=1))


def test_the_decision_is_that_of_prune(model: Model) -> None:
    given = rows(30)
    (found,) = map(as_decided, answered(model, asked(given)))
    expected = alone(given[:, :4])
    assert found.decision.indices.tolist() == expected.indices.tolist()
    assert 1 < len(found.decision) < 4
    assert torch.equal(found.embeds, given[found.decision.placeholders])
    assert found.seconds.keys() == {"encode", "spectrum", "select"}
    assert found.explanation is None


@pytest.mark.parametrize("selector", ["span", "uniform"])
def test_by_span_no_spectrum_is_computed(model: Model, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows(30)
    question = asked(given, energy=0.8, selector=selector)
    (spectral,) = map(as_decided, answered(model, question))
    monkeypatch.delattr(torch.linalg, "eigvalsh")
    (found,) = map(as_decided, answered(model, question, budget="span"))
    encoding = Encoding(VisualTokens(given[:, :4], None), Layout.whole(1, 30), "span")
    expected = prune(encoding, PruneOptions.model_validate_json(question.options))
    assert found.decision.indices.tolist() == expected.indices.tolist()
    assert len(found.decision) >= len(spectral.decision)
    (explained,) = map(as_decided, answered(model, asked(given, explain=True), budget="span"))
    assert explained.explanation
    assert tokens_needed(explained.explanation.thresholds.numpy(), 0.8) == len(found.decision)


def test_newlines_are_kept_but_are_no_features(model: Model) -> None:
    given = rows(31)
    given[-1] = 1e6
    (found,) = map(as_decided, answered(model, asked(given, "video")))
    assert found.decision.newlines == 1
    assert torch.equal(found.embeds, given[found.decision.placeholders])
    assert torch.equal(found.embeds[-1], given[-1])
    assert found.decision.indices.max() < 30


def test_separate_features_are_used_for_the_decision(model: Model) -> None:
    model.apart = True
    given = rows(30)
    (found,) = map(as_decided, answered(model, asked(given)))
    expected = alone(given * 2)
    assert found.decision.indices.tolist() == expected.indices.tolist()
    assert torch.equal(found.embeds, given[found.decision.placeholders])


def test_batches_are_vllms_and_responses_keep_their_order(model: Model) -> None:
    lengths = [20, 21, 22, 23, 24]
    modalities = ["image", "video", "image", "video", "image"]
    questions = [asked(rows(length), modality) for length, modality in zip(lengths, modalities, strict=True)]
    found = list(map(as_decided, answered(model, *questions)))
    assert model.batches == [("image", [20, 22, 24]), ("video", [21, 23])]
    assert [answer.decision.unpruned for answer in found] == lengths


def test_attention_is_captured_one_image_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Observing:
        """Yields attention ``0, 1, 2, ...`` where it is wanted."""

        def __init__(self, _: Any, wanted: bool) -> None:
            self.wanted = wanted

        def __enter__(self) -> Any:
            return lambda: torch.arange(20.0) if self.wanted else None

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(module, "capturing", Observing)
    selectors = ["attention", "span", "hybrid", "attention", "uniform"]
    questions = [asked(rows(20), selector=name, min_tokens=4, max_tokens=4) for name in selectors]
    found = list(map(as_decided, answered(model, *questions)))
    assert model.batches == [("image", [20, 20]), ("image", [20]), ("image", [20]), ("image", [20])]
    assert [answer.decision.selector for answer in found] == selectors
    # Arranged, the first draw most.
    assert found[0].decision.indices.tolist() == found[3].decision.indices.tolist() == [0, 1, 2, 3]
    # Where ranks share images out, nobody sees all of it.
    model.batches.clear()
    shared = list(map(as_decided, answered(model, *questions, tp_mode="data")))
    assert model.batches == [("image", [20] * 5)]
    assert [answer.decision.selector for answer in shared] == ["span", "span", "span", "span", "uniform"]


@pytest.mark.parametrize("energy", [0.9, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_fail_alone(model: Model, energy: float, bad: float) -> None:
    given = rows(20)
    given[3, 1] = bad
    good, failed, last = answered(model, *(asked(each, energy=energy) for each in (rows(20), given, rows(20))))
    assert isinstance(failed, DecisionError)
    assert failed.reason == "features"
    assert "NaN or infinite" in failed.error
    assert isinstance(good, DecisionResult)
    assert isinstance(last, DecisionResult)


def test_embeddings_that_overflow_their_dtype_fail(model: Model) -> None:
    """Though the features, which are others, do not."""
    given = rows(20).half()
    given[:, 7] = torch.inf
    (failed,) = answered(model, asked(given))
    assert failed == DecisionError("features of this image are too large for torch.float16", "features")


class Small(Model):
    """Encodes no two at a time, and none of 21 tokens."""

    error: Exception = torch.OutOfMemoryError()

    def eadaprune_encode(self, modality: str, rows: Any, **_: Any) -> tuple[list[torch.Tensor], Any]:
        encoded = super().eadaprune_encode(modality, rows)
        if self.batches[-1][1] == [21] or len(rows) > 1:
            raise self.error
        return encoded


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("shapes differ")])
def test_what_fails_in_the_encoder_fails_alone(error: Exception) -> None:
    """Whoever asked in the same call has an answer."""
    model, given = Small(), [rows(20), rows(21), rows(22)]
    model.error = error
    good, failed, last = answered(model, *map(asked, given))
    assert model.batches == [("image", [20, 21, 22]), ("image", [20]), ("image", [21]), ("image", [22])]
    assert isinstance(failed, DecisionError)
    assert failed.reason == "engine"
    assert ("not enough memory" in failed.error) == isinstance(error, torch.OutOfMemoryError)
    for answer, of in ((good, given[0]), (last, given[2])):
        assert as_decided(answer).decision.indices.tolist() == alone(of[:, :4]).indices.tolist()


def test_tensor_parallel_ranks_do_not_retry() -> None:
    """One would wait for the others in a collective of the first attempt."""
    model = Small()
    with pytest.raises(torch.OutOfMemoryError):
        answered(model, asked(rows(20)), asked(rows(22)), ranks=2)
    assert model.batches == [("image", [20, 22])]


def test_out_of_memory_fails_one_image_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(encoding: Encoding, options: PruneOptions) -> Any:
        if encoding.tokens.num_tokens == 21:
            raise torch.OutOfMemoryError
        return prune(encoding, options)

    monkeypatch.setattr(module, "prune", greedy)
    found = answered(model, asked(rows(20)), asked(rows(21)), asked(rows(22)))
    assert [type(answer) for answer in found] == [DecisionResult, DecisionError, DecisionResult]
    assert isinstance(found[1], DecisionError)
    assert found[1].reason == "engine"


def test_spectra_of_a_batch_are_computed_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one size, as far as they are wanted; the decisions are those that each has alone."""
    sizes: list[list[int]] = []
    eigvalsh = torch.linalg.eigvalsh

    def noted(batch: torch.Tensor) -> Any:
        sizes.append([*batch.shape])
        return eigvalsh(batch)

    monkeypatch.setattr(torch.linalg, "eigvalsh", noted)
    given = [rows(20), rows(3), rows(20), rows(20), rows(20) * torch.nan]
    questions = [asked(each, energy=0.9 if index != 2 else 1.0) for index, each in enumerate(given)]
    *found, failed = answered(model, *questions)
    assert sizes == [[2, 4, 4], [1, 3, 3]]
    assert isinstance(failed, DecisionError)
    for index in (0, 1, 3):
        decided, expected = as_decided(found[index]).decision, alone(given[index][:, :4])
        assert decided.indices.tolist() == expected.indices.tolist()
        assert decided.spectral_energy == expected.spectral_energy
        assert decided.spectrum_seconds > 0


def test_failed_batch_of_spectra_is_computed_one_by_one(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eigvalsh = torch.linalg.eigvalsh

    def small(batch: torch.Tensor) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return eigvalsh(batch)

    monkeypatch.setattr(torch.linalg, "eigvalsh", small)
    given = [rows(20), rows(20)]
    for decided, each in zip(answered(model, *map(asked, given)), given, strict=True):
        assert as_decided(decided).decision.indices.tolist() == alone(each[:, :4]).indices.tolist()
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning == "Spectra of 2 images were not computed together (OutOfMemoryError())"


def test_wrong_number_of_embeddings_fails_alone(model: Model) -> None:
    question = asked(rows(20))
    question.num_placeholders = 19
    model.eadaprune_layout = lambda *_: Layout.whole(1, len(_[2]["rows"]))  # type: ignore[method-assign]
    good, failed = answered(model, asked(rows(20)), question)
    assert isinstance(good, DecisionResult)
    assert failed == DecisionError(
        "this image could not be pruned: the model made 20 embeddings where vLLM expects 19 placeholders"
    )


def test_empty_features_fail_alone(model: Model) -> None:
    """Embeddings of a client may be none."""
    good, failed = answered(model, asked(rows(20)), asked(rows(0)))
    assert isinstance(good, DecisionResult)
    assert isinstance(failed, DecisionError)


def test_other_ranks_encode_too(model: Model) -> None:
    assert answered(model, asked(rows(20)), asked(rows(21), "video"), answers=False) == []
    assert model.batches == [("image", [20]), ("video", [21])]


def test_explanations_have_no_embeddings(model: Model) -> None:
    given = rows(30)
    (found,) = map(as_decided, answered(model, asked(given, explain=True)))
    (decision,) = map(as_decided, answered(model, asked(given)))
    assert found.decision.indices.tolist() == decision.decision.indices.tolist()
    assert found.embeds.shape == (0, 8)
    assert found.explanation
    assert found.explanation.grids == [(1, 30)]
    assert found.explanation.curve[-1] == (30, 1.0)
    needed = found.explanation.thresholds
    assert needed.shape == (30,)
    # The first that the threshold is not above.
    assert len(found.decision) == int((needed <= 0.9).sum())


def test_empty_batch_has_no_responses(model: Model) -> None:
    assert answered(model) == []
    assert not model.batches
