"""What the scheduler sends to workers about a new request, on vLLM's own classes."""

import pytest
import torch
from samples import item
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from eadaprune_vllm.patches import scheduler

IMAGE = MultiModalFeatureSpec(
    item(pixel_values=torch.ones(2)), modality="image", identifier="a", mm_position=PlaceholderRange(offset=2, length=4)
)


def request(computed: int) -> Request:
    """A request whose first tokens are cached, or were loaded."""
    made = Request("a", [7] * 8, SamplingParams(max_tokens=1), None, mm_features=[IMAGE])
    made.num_computed_tokens = computed
    return made


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((Scheduler, "_free_request"), (NewRequestData, "from_request")):
        monkeypatch.setattr(owner, name, vars(owner)[name])  # so that it is as before in the end
    scheduler.install()


@pytest.mark.parametrize("computed", [0, 4, 7])
def test_the_first_model_runner_gets_all_pixels(computed: int) -> None:
    assert NewRequestData.from_request(request(computed), ([1],)).mm_features == [IMAGE]


def test_the_second_gets_those_that_it_encodes_now() -> None:
    cached, new = (NewRequestData.from_request(request(computed), ([1],), [7] * 8) for computed in (7, 4))
    assert [feature.data for feature in cached.mm_features] == [None]
    assert new.mm_features == [IMAGE]
