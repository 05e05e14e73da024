"""Naming plugins, and the metrics' names."""

import argparse
import json
import os
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from prometheus_client import CollectorRegistry, generate_latest

from eadaprune_vllm import compat
from eadaprune_vllm.architectures import ARCHITECTURES
from eadaprune_vllm.core.item_report import ItemReport
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.metrics import Metrics
from eadaprune_vllm.startup.flags import add_flags, apply_flags
from eadaprune_vllm.startup.naming import name_plugins

# vLLM's own plugins; naming them here does not activate ours in the process of the tests.
OTHERS = ["lora_filesystem_resolver", "lora_hf_hub_resolver"]


def test_naming_one_plugin_does_not_switch_the_others_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    name_plugins([OTHERS[0]])
    assert set(os.environ["VLLM_PLUGINS"].split(",")) >= {*OTHERS}
    assert "eadaprune" not in os.environ["VLLM_PLUGINS"].split(",")  # it was not named


def test_naming_adds_to_a_list_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "some_platform")
    name_plugins([OTHERS[0]])
    name_plugins([OTHERS[0]])
    assert os.environ["VLLM_PLUGINS"].split(",") == sorted(["some_platform", OTHERS[0]])


def test_unknown_plugins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(StartupError, match="--plugin nope: no such plugin is installed; installed are eadaprune, lora"):
        name_plugins(["nope"])
    assert "VLLM_PLUGINS" not in os.environ


def test_other_versions_of_vllm_are_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_version()
    monkeypatch.setattr(compat, "SUPPORTED", SpecifierSet(">=0.99"))
    with pytest.raises(StartupError, match=r"is not supported; supported is >=0\.99"):
        compat.check_version()
    monkeypatch.setenv("EADAPRUNE_SKIP_VERSION_CHECK", "1")
    compat.check_version()


def test_every_option_has_a_flag_that_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "eadaprune")
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser)
    assert vars(parser.parse_args([])) == {}
    text = " ".join(parser.format_help().split())
    assert "A number greater than 0 and at most 1. (default: the target's)" in text
    assert "(default: None)" not in text
    assert "(default: no limit)" in text
    options: dict[str, object] = {
        "target": 0.3,
        "energy": 0.9,
        "min_share": 0.2,
        "min_tokens": 2,
        "max_tokens": 64,
        "selector": "attention",
    }
    options |= {
        "budget": "span",
        "scope": "image",
        "enabled": False,
        "detail_low": {"energy": 0.5},
        "detail_high": {},
        "energy_floor": 0.1,
    }
    options |= {"load_aware": {"waiting_high": 8}}
    options |= {"energy_ceiling": 1.0, "max_tokens_ceiling": 99, "out_of_bounds": "clamp", "report": True}
    options |= {"report_cached": True, "any_model": True, "page": False, "trust_kv_connector": True}
    assert options.keys() == ServerOptions.model_fields.keys()
    line = []
    for name, value in options.items():
        flag = f"eadaprune-{name.replace('_', '-')}"
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        line += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", text]
    args = parser.parse_args(line)
    assert vars(args) == {f"eadaprune_{name}": value for name, value in options.items()}
    del args.eadaprune_target
    args.mm_processor_kwargs = {"eadaprune": {"energy": 0.5, "selector": "diversity"}}
    apply_flags(args)
    assert args.mm_processor_kwargs["eadaprune"] == {name: options[name] for name in options if name != "target"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--eadaprune-energy 2",
            "--eadaprune-energy 2.0 is not allowed; it must be a number greater than 0 and at most 1",
        ),
        ("--eadaprune-max-tokens 0", "--eadaprune-max-tokens 0 is not allowed; it must be an integer at least 1"),
        (
            "--eadaprune-energy 0.9 --eadaprune-target 0.3",
            "--eadaprune-energy and --eadaprune-target exclude each other",
        ),
        (
            "--eadaprune-energy-floor 0.9 --eadaprune-energy-ceiling 0.8",
            "--eadaprune-energy-floor 0.9 is above --eadaprune-energy-ceiling 0.8",
        ),
        (
            "--eadaprune-max-tokens 8 --eadaprune-min-tokens 16",
            "--eadaprune-min-tokens 16 is above --eadaprune-max-tokens 8",
        ),
        (
            '--eadaprune-detail-low {"energy":7}',
            "--eadaprune-detail-low: energy=7 is not allowed; it must be a number greater than 0 and at most 1",
        ),
        (
            '--eadaprune-load-aware {"target":0}',
            "--eadaprune-load-aware: target=0 is not allowed; it must be a number greater than 0 and at most 1",
        ),
    ],
)
def test_errors_name_the_flags_that_were_typed(line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "eadaprune")
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(line.split())
    args.mm_processor_kwargs = None
    with pytest.raises(StartupError) as error:
        apply_flags(args)
    assert str(error.value) == f"eadaprune: {words}"


def test_metrics() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    report = ItemReport(
        visual_tokens=576,
        kept_tokens=144,
        energy_threshold=0.99,
        energy_requested=0.995,
        spectral_energy=0.991,
        span_energy=0.98,
        bound="max_tokens",
        selector="attention",
    )
    metrics.count("m", Pruning({"image": [report], "video": [report]}, 0.5, kv_bytes_per_token=10))
    metrics.observe_stages("m", "request", encode=0.5, spectrum=0.0002, select=0.0003)
    metrics.count_rejected("m", "options", "request")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", **labels})

    assert value("eadaprune_images_total") == 1
    assert value("eadaprune_videos_total") == 1
    assert value("eadaprune_visual_tokens_total", stage="encoded") == 1152
    assert value("eadaprune_visual_tokens_total", stage="kept") == 288
    assert value("eadaprune_tokens_saved_total") == 864
    assert value("eadaprune_kv_cache_bytes_saved_total") == 8640
    assert value("eadaprune_kept_ratio_bucket", le="0.25") == 2
    assert value("eadaprune_kept_ratio_bucket", le="0.2") == 0
    assert value("eadaprune_energy_threshold_bucket", le="0.985") == 0
    assert value("eadaprune_energy_threshold_bucket", le="0.99") == 2
    assert value("eadaprune_energy_requested_bucket", le="0.99") == 0
    assert value("eadaprune_energy_requested_bucket", le="0.995") == 2
    assert value("eadaprune_load_lowered_total") == 2
    assert value("eadaprune_bound_total", bound="max_tokens") == 2
    assert value("eadaprune_stage_seconds_sum", stage="total", source="request") == pytest.approx(0.5005)
    assert value("eadaprune_stage_seconds_bucket", stage="spectrum", source="request", le="0.0001") == 0
    assert value("eadaprune_stage_seconds_bucket", stage="spectrum", source="request", le="0.0002") == 1
    assert value("eadaprune_stage_seconds_bucket", stage="encode", source="request", le="10.0") == 1
    assert value("eadaprune_rejected_requests_total", reason="options", source="request") == 1
    assert b"vllm:" not in generate_latest(registry)  # vLLM unregisters such names


def test_the_documents_list_what_is_supported() -> None:
    models = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| `(\w+(?:ForConditionalGeneration|ForCausalLM|ChatModel))` \|", models, re.MULTILINE)
    assert listed == list(ARCHITECTURES)
