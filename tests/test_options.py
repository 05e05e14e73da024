"""The one schema: what it accepts, what it says about the rest, and the key it gives."""

import math
import re

import pytest

from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.options import PruneOptions, resolve
from eadaprune_vllm.startup import server_options

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
        ({"selector": "best"}, "x.selector", "one of attention, span"),
        ({"selector": ["span"]}, "x.selector", "one of attention, span"),
        ({"enabled": "yes"}, "x.enabled", "true or false"),
        ({"engery": 0.9}, "x.engery", "the options are energy, min_tokens, max_tokens, selector, enabled"),
        ({"min_tokens": 9, "max_tokens": 8}, "x", "min_tokens=9 is above max_tokens=8"),
        ({"max_tokens": 8}, "x", "min_tokens=16 is above max_tokens=8"),
        (0.9, "x", "0.9 is not an object"),
        ([], "x", "[] is not an object"),
    ],
)
def test_bad_options_are_refused_with_field_value_and_range(override: object, field: str, words: str) -> None:
    with pytest.raises(InvalidOptionsError, match=re.escape(words)) as error:
        resolve(DEFAULTS, override, where="x")
    assert error.value.field == field


def test_an_override_leaves_the_rest_to_the_defaults() -> None:
    defaults = PruneOptions(energy=0.9, min_tokens=4)
    assert resolve(defaults, None) is defaults
    assert resolve(defaults, {}) == defaults
    assert resolve(defaults, {"max_tokens": 8}) == PruneOptions(energy=0.9, min_tokens=4, max_tokens=8)


def test_equal_options_have_one_key() -> None:
    keys = {
        resolve(DEFAULTS, override).key
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
    overrides += [{"selector": "span"}, {"enabled": False}]
    assert len({resolve(DEFAULTS, override).key for override in overrides}) == len(overrides)


def test_a_key_gives_the_options_back() -> None:
    options = PruneOptions(energy=0.123456789012345, max_tokens=77, selector="span")
    assert PruneOptions.model_validate_json(options.key) == options


def test_bad_server_options_stop_the_start() -> None:
    with pytest.raises(StartupError, match=r"^eadaprune: eadaprune\.energy=7 is not allowed") as error:
        server_options({"energy": 7})
    assert error.value.code == str(error.value)  # a process ends with the sentence and status 1
    assert server_options(None) == DEFAULTS


def test_every_option_is_described() -> None:
    assert all(field.description for field in PruneOptions.model_fields.values())
