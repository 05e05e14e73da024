"""A server that is told no threshold: it finds the one of its model, every front end has the same, and requests may
name another share."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import httpx
import openai
import pytest
from harness import DTYPE, Server
from PIL import Image

from eadaprune_vllm.core.words import percent
from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.reference import pictures

pytestmark = pytest.mark.timeout(900)
NUM_TOKENS = 576


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    flags = ["--plugin", "eadaprune", "--enforce-eager", "--dtype", DTYPE, "--api-server-count", "2"]
    return start("targets", *flags, "--limit-mm-per-prompt", '{"image": 16}', model=MODEL)


def test_it_says_at_start_what_the_target_comes_to(server: Server, logs: Path) -> None:
    found = httpx.get(server.url + "/v1/eadaprune/config", timeout=120).json()
    effective, reference = found["effective"], found["reference"]
    log = (logs / "targets.log").read_text()
    assert "eadaprune: target 0.33 is not reachable with this model" in log  # its features have 144 numbers
    assert f"eadaprune: energy {effective['energy']:g} keeps {percent(reference['kept'])} of the tokens" in log
    assert effective["target"] == pytest.approx(reference["kept"], abs=0.01)
    assert 0.111 <= reference["min_target"] < reference["kept"] < reference["max_target"] <= 144 / NUM_TOKENS
    assert len(set(reference["kept_by_kind"].values())) > 2


def test_every_front_end_has_the_same(server: Server) -> None:
    found = {httpx.get(server.url + "/v1/eadaprune/config", timeout=120).text for _ in range(12)}
    assert len(found) == 1


@pytest.mark.parametrize("options", [None, {"target": 0.2}])
def test_reference_pictures_keep_the_target_on_average(server: Server, options: dict[str, float] | None) -> None:
    images = [picture for _, picture in pictures()]
    answers = [server.ask(*some, options=options, max_tokens=1) for some in (images[:8], images[8:])]
    reports = [image for answer in answers for image in (answer.model_extra or {})["eadaprune"]["images"]]
    (target,) = {report["target"] for report in reports}
    kept = mean(report["kept_tokens"] for report in reports) / NUM_TOKENS
    assert kept == pytest.approx(target, abs=0.005)
    if options:
        assert target == options["target"]
    assert min(report["kept_tokens"] for report in reports) >= NUM_TOKENS / 9
    assert len({report["kept_tokens"] for report in reports}) > 8


def test_unreachable_target_is_a_400(server: Server) -> None:
    image = Image.new("RGB", (64, 64))
    for target in (0.05, 0.5):
        words = (
            rf"eadaprune\.target={target} is not allowed; with this model it must be at least 0\.111 and at most 0\."
        )
        with pytest.raises(openai.BadRequestError, match=words):
            server.ask(image, options={"target": target})
    with pytest.raises(openai.BadRequestError, match="energy and target exclude each other"):
        server.ask(image, options={"target": 0.2, "energy": 0.9})


def test_metrics(server: Server) -> None:
    found = httpx.get(server.url + "/v1/eadaprune/config", timeout=120).json()
    effective, reference = found["effective"], found["reference"]
    assert server.metric("eadaprune_default_target") == effective["target"]
    assert server.metric("eadaprune_default_min_share") == pytest.approx(1 / 9, abs=1e-5)
    assert server.metric("eadaprune_default_energy_threshold") == effective["energy"]
    assert server.metric("eadaprune_reference_at_bound_ratio") == reference["at_bound"]
    for kind, share in reference["kept_by_kind"].items():
        assert server.metric("eadaprune_reference_kept_ratio", kind=kind) == share
