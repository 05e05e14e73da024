"""Thresholds under load: the policy, its level, and who is exempt."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.core.options import PruneOptions, overlay
from eadaprune_vllm.core.server_options import Choice, OptionSource, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.load import FRESH_SECONDS, STEPS, Load
from eadaprune_vllm.frontend.metrics import Metrics
from eadaprune_vllm.frontend.request_options import choose

POLICY = LoadPolicy(energy_floor=0.9, kv_usage_low=0.5, kv_usage_high=0.9, waiting_low=2, waiting_high=10)


@pytest.mark.parametrize(
    ("kv_usage", "waiting", "pressure"),
    [(0, 0, 0), (0.5, 2, 0), (0.7, 0, 0.5), (0, 6, 0.5), (0.6, 6, 0.5), (0.9, 0, 1), (1, 99, 1)],
)
def test_pressure_is_that_of_the_stronger_signal(kv_usage: float, waiting: int, pressure: float) -> None:
    assert POLICY.pressure(kv_usage, waiting) == pytest.approx(pressure)


def levels(*pressures: float) -> list[float]:
    load = Load(POLICY)
    seen = []
    for pressure in pressures:
        load.observe(0, 0.5 + 0.4 * pressure, 0)
        seen.append(load.level)
    return seen


def test_the_level_rises_at_once_and_falls_a_step_late() -> None:
    assert levels(0.0, 0.2, 0.26, 0.8, 1.0) == [0, 0, 0.25, 0.75, 1]
    assert levels(1.0, 0.8, 0.74, 0.51, 0.3, 0.1, 0.0) == [1, 1, 0.75, 0.75, 0.5, 0.25, 0]
    # Around any one pressure it stands still, also where a step begins.
    random.seed(0)
    for around in (0.6, 0.75):
        assert len(set(levels(around + 0.05, *(around + random.uniform(-0.05, 0.05) for _ in range(200))))) == 1


def test_the_level_is_never_more_than_a_step_from_the_pressure() -> None:
    random.seed(0)
    load, pressure = Load(POLICY), 0.0
    for _ in range(1000):
        pressure = min(max(pressure + random.uniform(-0.3, 0.3), 0), 1)
        load.observe(0, 0.5 + 0.4 * pressure, 0)
        assert load.level * STEPS % 1 == 0
        assert abs(load.level - pressure) < 1 / STEPS + 1e-9
        assert load.level or pressure < 1 / STEPS


def test_engines_are_counted_as_by_vllm() -> None:
    load = Load(POLICY, engines=2)
    load.observe(0, 0.9, 0)
    assert load.level == 0.5
    load.observe(1, 0.9, 0)
    assert load.level == 1


def test_last_report_of_a_busy_engine_counts_until_it_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    here, there = (Load(POLICY, shared=tmp_path / "load") for _ in range(2))
    there.observe(0, 0, 0)  # the last step
    here.observe(0, 0.9, 0)  # the one before, taken in late
    assert here.level == there.level == 1
    now += FRESH_SECONDS
    assert here.level == there.level == 0
    there.observe(0, 0.75, 0)
    assert here.level == 0.5


def test_front_ends_share_reports_of_load(tmp_path: Path) -> None:
    here = Load(POLICY, engines=2, shared=tmp_path / "load")
    here.observe(0, 0.9, 0)
    code = f"""if True:
        from pathlib import Path
        from eadaprune_vllm.core.load_policy import LoadPolicy
        from eadaprune_vllm.frontend.load import Load
        there = Load(LoadPolicy(), engines=2, shared=Path({str(tmp_path / "load")!r}))
        assert there.level == 0.5, there.level
        there.observe(1, kv_usage=0.0, waiting=99)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert here.level == 1


@pytest.mark.parametrize(("level", "energy"), [(0, 0.99), (0.25, 0.9675), (0.5, 0.945), (0.75, 0.9225), (1, 0.9)])
def test_threshold_falls_to_the_floor(level: float, energy: float) -> None:
    options = PruneOptions(energy=0.99, min_tokens=7, max_tokens=100)
    assert Choice(options, energy_floor=0.9).at(level) == options.model_copy(update={"energy": energy})


@pytest.mark.parametrize("level", [0, 0.5, 1])
@pytest.mark.parametrize("floor", [None, 0.8, 0.85])
def test_thresholds_at_the_floor_below_it_or_exempt_are_not_lowered(level: float, floor: float | None) -> None:
    options = PruneOptions(energy=0.8)
    assert Choice(options, floor).at(level) is options


def test_load_switches_disabled_pruning_on() -> None:
    off = Choice(PruneOptions(enabled=False, energy=0.5), energy_floor=0.9)
    assert off.at(0).threshold == 1
    assert off.at(1).threshold == 0.9


@pytest.mark.parametrize("explicit", ["keep", "lower"])
def test_explicit_thresholds_are_kept_or_lowered(explicit: Any) -> None:
    server = ServerOptions(
        load_aware=LoadPolicy(explicit=explicit, energy_floor=0.9), energy=0.99, detail_low={"energy": 0.95}
    )
    floor = None if explicit == "keep" else 0.9
    assert server.choose().energy_floor == 0.9
    assert server.choose(OptionSource("x", {"max_tokens": 9}), server.preset("auto")).energy_floor == 0.9
    for layer in (OptionSource("x", {"energy": 0.97}), OptionSource("x", {"enabled": False}), server.preset("low")):
        assert server.choose(layer).energy_floor == floor
    assert ServerOptions().choose().energy_floor is None


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kv_usage_low": 2}, r"x\.load_aware\.kv_usage_low=2 is not allowed; it must be a number at least 0"),
        ({"kv_usage_low": 0.97}, r"x\.load_aware: kv_usage_low=0\.97 is not below kv_usage_high=0\.95"),
        ({"waiting_low": 5, "waiting_high": 5}, r"x\.load_aware: waiting_low=5 is not below waiting_high=5"),
        ({"floor": 0.5}, r"x\.load_aware\.floor is not an option; the options are target, energy_floor, kv_usage_low"),
        ({"explicit": "drop"}, r"x\.load_aware\.explicit='drop' is not allowed; it must be one of keep, lower"),
        (True, r"x\.load_aware=True is not allowed; it must be an object of options or null"),
        ({"energy_floor": 0.99}, r"x: load_aware\.energy_floor=0\.99 is not below the default, which is energy=0\.99"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy: object, message: str) -> None:
    with pytest.raises(InvalidOptionsError, match=message):
        overlay(ServerOptions(energy=0.99), {"load_aware": policy}, "x")


def test_images_of_earlier_turns_are_recognised() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    user = {"role": "user", "content": [image, {"type": "text", "text": "?"}, image]}
    answer = {"role": "assistant", "content": "!"}
    result = {"role": "tool", "content": [image]}
    met = {"image": 0, "video": 0}

    def answered(*messages: Any) -> list[bool]:
        return [choice.from_previous_turn for choice in choose(ServerOptions(), [], list(messages), met)["image"]]

    assert answered(user) == [False, False]
    assert answered(user, answer, user) == [True, True, False, False]
    assert answered(user, answer, user, answer, result) == [True, True, True, True, False]


def test_sticky_items_keep_their_last_threshold() -> None:
    load = Load(POLICY)
    front_end = FrontEnd(DecisionClient(1), Metrics(CollectorRegistry()), "m", 1, load)
    choice = Choice(PruneOptions(energy=0.98), energy_floor=0.9)
    assert front_end.effective_options(choice, "a", sticky=False).energy == 0.98
    load.observe(0, 0.9, 0)
    assert front_end.effective_options(choice, "a", sticky=True).energy == 0.98
    assert front_end.effective_options(choice, "b", sticky=True).energy == 0.9  # never seen
    assert front_end.effective_options(choice, "a", sticky=False).energy == 0.9
    load.observe(0, 0, 0)
    assert front_end.effective_options(choice, "a", sticky=True).energy == 0.9
    assert (
        front_end.effective_options(Choice(PruneOptions(energy=0.97), 0.9), "a", sticky=True).energy == 0.97
    )  # asked otherwise
    assert front_end.effective_options(choice, "a", sticky=False).energy == 0.98
