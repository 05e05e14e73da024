"""The front end asks first: what is counted of answers, and how a renderer comes by them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from samples import decided, question
from vllm.multimodal.processing.processor import ResolvedPromptUpdate, UpdateMode

from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.items import PrunedDetails
from eadaprune_vllm.frontend.metrics import Metrics, Source
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.processor import Steps
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse
from eadaprune_vllm.patches.renderer import decide_between


class Prepared(DecisionClient):
    """Answers that are known before."""

    def __init__(self, *answers: DecisionResponse) -> None:
        super().__init__(max_encoder_tokens=100)
        self.answers = list(answers)

    async def decide(self, questions: Any) -> list[DecisionResponse]:
        return self.decide_sync(questions)

    def decide_sync(self, questions: Any) -> list[DecisionResponse]:
        assert all(isinstance(question, DecisionRequest) for question in questions)
        return [self.answers.pop(0) for _ in questions]


def new() -> PendingItem:
    content = PrunedDetails([7] * 4)
    return PendingItem(
        question(),
        ResolvedPromptUpdate("image", 0, UpdateMode.REPLACE, [7], content),
        needs_decision=True,
        is_client_embedding=False,
    )


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("source", "other"), [("request", "preview"), ("preview", "request")])
def test_stages_are_timed_and_errors_counted(waits: bool, source: Source, other: Source) -> None:
    """By whose they are."""
    registry = CollectorRegistry()
    decision_client = Prepared(decided(1), DecisionError("NaN", "features"), decided(3), DecisionError("no memory"))
    front_end = FrontEnd(decision_client, Metrics(registry), "m", 1)
    asked = [new() for _ in range(4)]
    if waits:
        front_end.decide_sync(asked, source)
    else:
        asyncio.run(front_end.decide(asked, source))
    assert [bool(each.response) for each in asked] == [True] * 4
    assert [each.timing.stages if each.timing else None for each in asked] == [{"encode": 0.25}, None] * 2
    assert len(asked[2].decided().decision) == 3

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", **labels})

    for of, times in ((source, 1), (other, 0)):
        assert value("eadaprune_stage_seconds_count", stage="encode", source=of) == 2 * times
        for reason in ("features", "engine"):
            assert value("eadaprune_rejected_requests_total", reason=reason, source=of) == times


def test_shared_decision_is_timed_once() -> None:
    registry = CollectorRegistry()
    front_end = FrontEnd(Prepared(decided(1), decided(1)), Metrics(registry), "m", 1)
    shared = new()
    question = shared.request
    front_end.decide_sync([shared])
    front_end.decide_sync([shared])
    assert len(shared.decided().decision) == 1
    labels = {"model_name": "m", "stage": "encode", "source": "request"}
    assert registry.get_sample_value("eadaprune_stage_seconds_count", labels) == 1
    assert "name" in question.item  # which another may be sending
    assert not shared.request.item


@pytest.mark.parametrize("waits", [False, True])
def test_an_item_that_another_request_got_decided_meanwhile_is_not_sent(waits: bool) -> None:
    """Its pixels are gone."""
    front_end = FrontEnd(Prepared(decided(1), decided(2)), Metrics(CollectorRegistry()), "m", 1)
    shared, own = new(), new()
    undecided = [shared, own]  # of one request
    front_end.decide_sync([shared])  # of the other
    if waits:
        front_end.decide_sync(undecided)
    else:
        asyncio.run(front_end.decide(undecided))
    assert [len(each.decided().decision) for each in undecided] == [1, 2]


class Renderer:
    """As vLLM's: it applies its processor, whose steps leave something undecided twice."""

    def __init__(self, front_end: Any) -> None:
        self.mm_processor = SimpleNamespace(front_end=front_end)
        self._mm_executor = ThreadPoolExecutor(1)
        self.seen: list[Any] = []
        self.updates = 0

    def _process_multimodal(self, prompt: str, *, mm_processor_kwargs: dict[str, Any] | None) -> Any:
        self.seen.append(mm_processor_kwargs)
        return self._steps(prompt)

    async def _process_multimodal_async(self, prompt: str, *, mm_processor_kwargs: dict[str, Any] | None) -> Any:
        self.seen.append(mm_processor_kwargs)
        return self._steps(prompt)

    def _steps(self, prompt: str) -> Steps:
        for _ in range(2):
            undecided = new()
            yield [undecided]
            assert undecided.response
        return {"input of": prompt}

    def update_mm_cache_stats(self) -> None:
        self.updates += 1


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [None, {}, {"other": 1}, {"other": 1, "eadaprune": {"energy": 0.5}}, {"eadaprune": None}, {"eadaprune": [0.5]}],
)
def test_renderer_continues_once_all_items_are_decided(waits: bool, kwargs: dict[str, Any] | None) -> None:
    renderer = Renderer(FrontEnd(Prepared(decided(), decided()), Metrics(CollectorRegistry()), "m", 1))
    decide_between(renderer)
    before = dict(kwargs) if kwargs else kwargs
    if waits:
        found = renderer._process_multimodal("a prompt", mm_processor_kwargs=kwargs)
    else:
        found = asyncio.run(renderer._process_multimodal_async("a prompt", mm_processor_kwargs=kwargs))
    assert found == {"input of": "a prompt"}
    own = (kwargs or {}).get("eadaprune")  # what is no object is for the processor to refuse
    assert renderer.seen == [(kwargs or {}) | {"eadaprune": {} if own is None else own}]
    assert renderer.updates == 1
    assert kwargs == before  # they are the client's, and may be those of more prompts


def test_renderer_without_the_expected_methods_stops_the_start() -> None:
    with pytest.raises(StartupError, match="renderer is not of the kind known"):
        decide_between(SimpleNamespace(mm_processor=SimpleNamespace(front_end=None)))
