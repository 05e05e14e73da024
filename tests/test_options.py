"""The one schema: what it accepts, what it says about the rest, and the key it gives."""

import math
import re

import pytest

from eadaprune_vllm.core.options import PruneOptions, overlay, request_schema
from eadaprune_vllm.core.selectors import SELECTORS
from eadaprune_vllm.core.server_options import OptionSource, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.startup.configuration import operator_options

DEFAULTS = PruneOptions()


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ({"energy": 1.5}, "x.energy", "1.5 is not allowed; it must be a number greater than 0 and at most 1"),
        ({"energy": 0}, "x.energy", "greater than 0"),
        ({"energy": True}, "x.energy", "True is not allowed"),
        ({"energy": "0.5"}, "x.energy", "'0.5' is not allowed"),
        ({"energy": math.nan}, "x.energy", "nan is not allowed"),
        ({"energy": math.inf}, "x.energy", "inf is not allowed"),
        ({"energy": None}, "x.energy", "None is not allowed"),
        ({"min_tokens": 0}, "x.min_tokens", "an integer at least 1"),
        ({"min_tokens": 1.5}, "x.min_tokens", "an integer at least 1"),
        ({"max_tokens": "8"}, "x.max_tokens", "an integer at least 1 or null"),
        ({"selector": "best"}, "x.selector", "one of " + ", ".join(SELECTORS)),
        ({"selector": ["span"]}, "x.selector", "one of " + ", ".join(SELECTORS)),
        ({"enabled": "yes"}, "x.enabled", "true or false"),
        ({"engery": 0.9}, "x.engery", "the options are target, energy, min_tokens, min_share, max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "x", "min_tokens=9 is above max_tokens=8"),
        ({"min_tokens": 8, "max_tokens": 0}, "x.max_tokens", "an integer at least 1 or null"),
        (0.9, "x", "0.9 is not an object"),
        ([], "x", "[] is not an object"),
    ],
)
def test_bad_options_are_refused_with_field_value_and_range(override: object, field: str, words: str) -> None:
    with pytest.raises(InvalidOptionsError, match=re.escape(words)) as error:
        overlay(DEFAULTS, override, where="x")
    assert error.value.field == field


def test_an_override_leaves_the_rest_to_the_defaults() -> None:
    defaults = PruneOptions(energy=0.9, min_tokens=4)
    assert overlay(defaults, None, "x") is defaults
    assert overlay(defaults, {}, "x") == defaults
    assert overlay(defaults, {"max_tokens": 8}, "x") == PruneOptions(energy=0.9, min_tokens=4, max_tokens=8)


def test_at_most_so_many_lowers_at_least_so_many() -> None:
    assert overlay(DEFAULTS, {"max_tokens": 8}, "x") == PruneOptions(min_tokens=8, max_tokens=8)
    assert overlay(DEFAULTS, {"max_tokens": None}, "x") == DEFAULTS
    # So that a preset can always be had, whatever a request says of the fewest tokens.
    server = ServerOptions(min_tokens=100, detail_low={"energy": 0.9, "max_tokens": 64})
    assert server.resolve(OptionSource("x", {"min_tokens": 200}), server.preset("low")).min_tokens == 64
    with pytest.raises(InvalidOptionsError, match="min_tokens=100 is above max_tokens=64"):
        server.resolve(server.preset("low"), OptionSource("x", {"min_tokens": 100}))


def test_equal_options_have_one_key() -> None:
    keys = {
        overlay(DEFAULTS, override, "x").key
        for override in (
            {"energy": 1, "min_tokens": 4},
            {"min_tokens": 4, "energy": 1.0},
            {"min_tokens": 4, "energy": 1.0, "max_tokens": None},
            {"min_tokens": 4, "energy": 1.0, "selector": DEFAULTS.selector, "enabled": True},
        )
    }
    assert len(keys) == 1


def test_different_options_have_different_keys() -> None:
    overrides = [{}, {"energy": 0.9}, {"energy": 0.9 + 1e-12}, {"min_tokens": 1}, {"max_tokens": 99}]
    overrides += [{"selector": "attention"}, {"enabled": False}]
    assert len({overlay(DEFAULTS, override, "x").key for override in overrides}) == len(overrides)


def test_key_parses_to_the_options() -> None:
    options = PruneOptions(energy=0.123456789012345, max_tokens=77, selector="attention")
    assert PruneOptions.model_validate_json(options.key) == options


def test_bad_server_options_stop_the_start() -> None:
    with pytest.raises(StartupError, match=r"^eadaprune: energy=7 is not allowed") as error:
        operator_options({"energy": 7})
    assert error.value.code == str(error.value)  # a process ends with the sentence and status 1


def test_every_option_is_described() -> None:
    assert all(field.description for field in ServerOptions.model_fields.values())


def test_sources_override_each_other_in_order() -> None:
    server = ServerOptions(energy=0.9, min_tokens=4, min_share=0)
    layers = [
        OptionSource("header", {"energy": 0.8}),
        OptionSource("request", {"max_tokens": 99}),
        OptionSource("image", {"energy": 0.7}),
    ]
    assert server.resolve() == PruneOptions(energy=0.9, min_tokens=4)
    assert server.resolve(*layers) == PruneOptions(energy=0.7, min_tokens=4, max_tokens=99)
    assert server.resolve(*layers[:2], OptionSource("none", None)) == PruneOptions(
        energy=0.8, min_tokens=4, max_tokens=99
    )


def test_invalid_options_are_rejected_even_if_overridden() -> None:
    with pytest.raises(InvalidOptionsError, match=r"request\.energy=7"):
        ServerOptions().resolve(OptionSource("request", {"energy": 7}), OptionSource("image", {"energy": 0.7}))


def test_presets() -> None:
    presets = {"detail_low": {"energy": 0.5, "max_tokens": 32}, "detail_high": {"enabled": False}}
    server = ServerOptions.model_validate({"energy": 0.95, "min_share": 0.0} | presets)
    assert server.resolve(server.preset("auto")) == server.defaults
    assert server.resolve(server.preset("low")) == PruneOptions(energy=0.5, max_tokens=32)
    assert server.resolve(server.preset("high")) == server.resolve(server.preset("original"))
    assert server.resolve(server.preset("high")).threshold == 1
    for detail in ("medium", 3, None, ["low"]):
        with pytest.raises(InvalidOptionsError, match="must be one of auto, low, high, original") as error:
            server.preset(detail, "images[0].detail")
        assert error.value.field == "images[0].detail"


LIMITS: dict[str, object] = {"energy_floor": 0.5, "energy_ceiling": 0.95, "max_tokens_ceiling": 200}
BOUNDS = LIMITS | {"energy": 0.9, "min_share": 0.0}


@pytest.mark.parametrize(
    ("override", "field", "clamp_to"),
    [
        ({"energy": 0.4}, "energy", {"energy": 0.5}),
        ({"energy": 0.99}, "energy", {"energy": 0.95}),
        ({"enabled": False}, "enabled", {"energy": 0.95}),
        ({"enabled": False, "energy": 0.1}, "enabled", {"energy": 0.95}),
        ({"max_tokens": 300}, "max_tokens", {}),
        ({"min_tokens": 300}, "min_tokens", {"min_tokens": 200}),
    ],
)
def test_requests_beyond_the_bounds(override: dict[str, object], field: str, clamp_to: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionsError, match=rf"^x\.{field}=.* is outside the bounds of this server") as error:
        ServerOptions.model_validate(BOUNDS).resolve(OptionSource("x", override))
    assert "energy_floor=0.5, energy_ceiling=0.95, max_tokens_ceiling=200" in str(error.value)
    server = ServerOptions.model_validate(BOUNDS | {"out_of_bounds": "clamp"})
    expected = PruneOptions.model_validate({"energy": 0.9, "max_tokens": 200} | clamp_to)
    assert server.resolve(OptionSource("x", override)) == expected


def test_requests_within_the_bounds() -> None:
    server = ServerOptions.model_validate(BOUNDS)
    for override in (None, {}, {"energy": 0.5}, {"energy": 0.95}, {"max_tokens": 200}, {"min_tokens": 200}):
        assert server.resolve(OptionSource("x", override)).max_tokens == 200
    assert server.resolve(OptionSource("x", {"max_tokens": None})).max_tokens == 200  # as many as it may
    # Presets are the operator's own: they never leave the bounds and are never refused.
    assert server.resolve(server.preset("high")).threshold == 0.95
    assert ServerOptions(energy=0.5, min_share=0, energy_ceiling=0.99).resolve(
        OptionSource("x", {"enabled": False, "energy": 0.9}, trusted=True)
    ) == (PruneOptions(energy=0.99))
    assert ServerOptions(energy=0.5, min_share=0, max_tokens_ceiling=99).resolve() == PruneOptions(
        energy=0.5, max_tokens=99
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"energy_floor": 0.9, "energy_ceiling": 0.8}, "eadaprune: energy_floor=0.9 is above energy_ceiling=0.8"),
        (
            {"energy": 0.99, "energy_ceiling": 0.9},
            "eadaprune: energy=0.99 is outside the bounds of this server: energy_ceiling=0.9",
        ),
        ({"enabled": False, "max_tokens_ceiling": 64}, "eadaprune: enabled=False is outside the bounds"),
        ({"detail_low": {"energy": 7}}, "eadaprune: detail_low.energy=7 is not allowed"),
        ({"detail_high": {"x": 7}}, "eadaprune: detail_high.x is not an option; the options are target"),
        ({"detail_low": 3}, "eadaprune: detail_low=3 is not allowed; it must be an object"),
        ({"out_of_bounds": "ignore"}, "eadaprune: out_of_bounds='ignore' is not allowed; it must be one of reject, cl"),
        ({"max_tokens_ceiling": 0}, "eadaprune: max_tokens_ceiling=0 is not allowed; it must be an integer at least 1"),
        ({"device": "cpu"}, "eadaprune: device is not an option; the options are target"),
        ({"report": 1}, "eadaprune: report=1 is not allowed; it must be true or false"),
    ],
)
def test_contradictions_stop_the_start(given: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError, match=re.escape(words)):
        operator_options(given)


def test_the_schema_of_requests_has_no_defaults() -> None:
    schema = request_schema()
    assert schema["properties"].keys() == PruneOptions.model_fields.keys()
    assert not any("default" in option for option in schema["properties"].values())
    assert "required" not in schema


def test_a_client_cannot_make_an_error_long_or_of_several_lines() -> None:
    with pytest.raises(InvalidOptionsError) as error:
        overlay(PruneOptions(), {"x\n" * 10_000: 1}, "eadaprune")
    for text in (str(error.value), error.value.field):
        assert len(text) < 200
        assert "\n" not in text
