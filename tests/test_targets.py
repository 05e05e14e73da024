"""From a share of tokens to a threshold: what a target comes to, for whom, and within which bounds."""

from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest

from eadaprune_vllm.core.budget import Curve, Targets
from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.core.options import UNBOUNDED, PruneOptions
from eadaprune_vllm.core.server_info import Reference
from eadaprune_vllm.core.server_options import OptionSource, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.patches.engine_client import receive_curves

FREE = PruneOptions.model_validate(UNBOUNDED)
N = 400


def curve(name: str, decay: float, rank: int = N) -> Curve:
    """The spectrum of a picture whose energies fall like ``i ** -decay``, as far as its rank goes."""
    shares = np.arange(1, N + 1) ** -decay * (np.arange(N) < rank)
    return Curve(name, np.concatenate(([0.0], shares.cumsum()[:-1] / shares.sum())).clip(max=1))


CURVES = [curve("page", 2.0), curve("photograph", 0.6), curve("photograph", 0.8), curve("surface", 4.0)]
FLAT = [curve("page", 0.5, rank=100), curve("surface", 0.7, rank=100)]  # none can use more than a quarter


@pytest.mark.parametrize("options", [FREE, FREE.model_copy(update={"min_share": 0.1, "max_tokens": 300})])
@pytest.mark.parametrize("target", [0.15, 0.33, 0.5])
def test_pictures_keep_the_target_on_average(target: float, options: PruneOptions) -> None:
    energy = Targets(CURVES, options).energy(target)
    at = options.model_copy(update={"energy": energy})
    assert mean(each.share(at) for each in CURVES) == pytest.approx(target, abs=2 / N)
    assert CURVES[3].share(at) < CURVES[0].share(at) < CURVES[1].share(at) or options.min_share


def test_front_ends_have_the_threshold_of_the_first_engine() -> None:
    multimodal = SimpleNamespace(eadaprune=ServerOptions())
    config = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal))
    client, energies = SimpleNamespace(vllm_config=config), list[float]()
    for rank, curves in ((1, CURVES[1:]), (0, CURVES), (2, CURVES[2:])):
        said = [(each.name, each.thresholds.tobytes()) for each in curves]
        receive_curves(client, {"data_parallel_rank": rank, "eadaprune": said})
        energies.append(ServerOptions.of(multimodal).resolve().energy)
    assert energies[1] == energies[2] == ServerOptions().with_curves(CURVES).resolve().energy != energies[0]


def test_an_engine_without_the_plugin_stops_the_start() -> None:
    with pytest.raises(StartupError, match="engine 3 runs without the plugin; every node"):
        receive_curves(SimpleNamespace(), {"data_parallel_rank": 3})


def test_the_default_is_what_the_target_comes_to() -> None:
    server = ServerOptions().with_curves(CURVES)
    options = server.resolve()
    assert options.target == 0.33
    assert mean(each.share(options) for each in CURVES) == pytest.approx(0.33, abs=0.01)
    assert server.resolve(OptionSource("x", {"max_tokens": 9})).energy == options.energy
    assert options.floor(N) == 45  # a ninth
    assert server.resolve(OptionSource("x", {"min_tokens": 4})).floor(N) == 4


def test_an_energy_takes_the_place_of_the_target() -> None:
    for server in (ServerOptions(energy=0.9).with_curves(CURVES), ServerOptions().with_curves(CURVES)):
        options = server.resolve(OptionSource("x", {"energy": 0.9}))
        assert (options.energy, options.target) == (0.9, None)
    assert ServerOptions(energy=0.9).with_curves(CURVES).resolve().target is None
    with pytest.raises(InvalidOptionsError, match="x: energy and target exclude each other"):
        ServerOptions().with_curves(CURVES).resolve(OptionSource("x", {"energy": 0.9, "target": 0.2}))


def test_requests_may_name_a_target() -> None:
    server = ServerOptions(energy=0.9).with_curves(CURVES)
    options = server.resolve(OptionSource("x", {"target": 0.2}))
    assert mean(each.share(options) for each in CURVES) == pytest.approx(0.2, abs=0.01)
    # Where it comes from makes no difference to caches.
    assert options.key == server.resolve(OptionSource("x", {"energy": options.energy})).key
    for target in (0.05, 0.9999):
        with pytest.raises(InvalidOptionsError, match=rf"x\.target={target} is not allowed; .* at least 0\.113 and"):
            server.resolve(OptionSource("x", {"target": target}))
    for bad in (0, 1.5, "0.2"):
        with pytest.raises(InvalidOptionsError, match=r"x\.target=.* a number greater than 0 and at most 1 or null"):
            server.resolve(OptionSource("x", {"target": bad}))


def test_a_target_is_brought_within_what_the_features_allow() -> None:
    server = ServerOptions().with_curves(FLAT)
    options = server.resolve()
    assert options.target == pytest.approx(2 / 3 * 100 / 400, abs=0.001)
    shares = [each.share(options) for each in FLAT]
    assert max(shares) > 1.05 * min(shares)
    assert server.resolve(server.preset("low")).target == options.target  # it asks for more as well
    reference = Reference.of(server)
    assert reference.max_target == 100 / 400
    assert reference.kept == pytest.approx(options.target, abs=0.01)


def test_no_target_of_features_of_full_rank_is_cut() -> None:
    assert ServerOptions(target=0.7).with_curves(CURVES).resolve().target == 0.7


def test_bounds_of_energy_hold_for_targets() -> None:
    bounded = ServerOptions(energy_floor=0.9).with_curves(CURVES)
    low = ServerOptions().with_curves(CURVES).resolve(OptionSource("x", {"target": 0.15})).energy
    assert low < 0.9
    with pytest.raises(InvalidOptionsError, match=rf"x\.target=0\.15 \(energy {low:g}\) is outside the bounds"):
        bounded.resolve(OptionSource("x", {"target": 0.15}))
    # The operator's own is not refused, and no longer called what it is not.
    options = ServerOptions(target=0.15, energy_floor=0.9).with_curves(CURVES).resolve()
    assert (options.energy, options.target) == (0.9, None)


def test_load_lowers_the_target() -> None:
    choice = ServerOptions(load_aware=LoadPolicy(target=0.2)).with_curves(CURVES).choose()
    assert choice.at(0) == choice.options
    assert choice.at(1).target is None
    assert mean(each.share(choice.at(1)) for each in CURVES) == pytest.approx(0.2, abs=0.01)
    for policy in (LoadPolicy(target=0.4), LoadPolicy(energy_floor=0.9999)):
        with pytest.raises(ValueError, match=r"load_aware\.(target|energy_floor)=.* is not below the default"):
            ServerOptions(load_aware=policy).with_curves(CURVES)


def test_defaults_are_reported_by_kind_of_picture() -> None:
    reference = Reference.of(ServerOptions(min_share=0, min_tokens=40).with_curves(CURVES))
    assert list(reference.kept_by_kind) == ["page", "photograph", "surface"]
    assert reference.kept_by_kind["surface"] == 0.1
    assert reference.at_bound == 0.5  # the surface and the page
    assert " % of the tokens of reference pictures: pages " in str(reference)
    assert "photographs 5" in str(reference)
