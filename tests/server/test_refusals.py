"""What cannot be served does not start: status 1 or 2, one sentence, no traceback."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from harness import VLLM, Server, environment
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PixtralVisionConfig

PRUNING = ["--plugin", "eadaprune"]


def refusal(model: Path, *flags: str, **env: str) -> str:
    """What ``vllm serve`` says last when it refuses to start."""
    result = subprocess.run(
        [VLLM, "serve", str(model), "--port", "1", "--max-model-len", "1024", *flags],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode in (1, 2), result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--eadaprune-energy", "0.9"], "eadaprune: --eadaprune-energy does nothing without --plugin eadaprune"),
        (["--plugin", "nope"], "eadaprune: --plugin nope: no such plugin is installed; installed are"),
        ([*PRUNING, "--eadaprune-energy", "1.9"], "eadaprune.energy=1.9 is not allowed; it must be a number greater"),
        ([*PRUNING, "--eadaprune-energy", "high"], "argument --eadaprune-energy: invalid float value: 'high'"),
        ([*PRUNING, "--eadaprune-enregy", "0.9"], "unrecognized arguments: --eadaprune-enregy"),
        ([*PRUNING, "--mm-processor-kwargs", '{"eadaprune": {"x": 1}}'], "eadaprune.x is not an option"),
        ([*PRUNING, "--language-model-only"], "so there is nothing to prune"),
        ([*PRUNING, "--enable-mm-embeds"], "--enable-mm-embeds is not supported"),
        ([*PRUNING, "--model-impl", "transformers"], "the architecture TransformersMultiModalForCausalLM is not"),
        ([*PRUNING, "--load-format", "tensorizer"], "--load-format tensorizer is not supported"),
    ],
)
def test_configurations_that_cannot_be_honoured(model: Path, flags: list[str], sentence: str) -> None:
    assert sentence in refusal(model, *flags)


def test_the_rust_front_end(model: Path) -> None:
    binary = VLLM  # any path; it is never run
    said = refusal(model, *PRUNING, VLLM_USE_RUST_FRONTEND="1", VLLM_RUST_FRONTEND_PATH=binary)
    assert "the Rust front end (VLLM_USE_RUST_FRONTEND) is not supported" in said


def test_an_untested_version(model: Path, tmp_path: Path) -> None:
    """``sitecustomize`` stands in for another release of vLLM."""
    (tmp_path / "sitecustomize.py").write_text(
        "import eadaprune_vllm.hooks as hooks\n"
        "from packaging.specifiers import SpecifierSet\n"
        "hooks.TESTED = SpecifierSet('>=0.99')\n"
    )
    said = refusal(model, *PRUNING, PYTHONPATH=str(tmp_path))
    assert "is not supported; tested is >=0.99 (set EADAPRUNE_SKIP_VERSION_CHECK=1 to try it all the same)" in said
    said = refusal(model, *PRUNING, "--enable-mm-embeds", PYTHONPATH=str(tmp_path), EADAPRUNE_SKIP_VERSION_CHECK="1")
    assert "--enable-mm-embeds is not supported" in said  # one step further


def test_another_architecture(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    said = refusal(tmp_path, *PRUNING, "--load-format", "dummy", "--skip-tokenizer-init")
    assert "the architecture LlamaForCausalLM is not supported; supported are LlavaForConditionalGeneration" in said


def test_a_pixtral_tower(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] = PixtralVisionConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refusal(tmp_path, *PRUNING)
    assert "the vision tower of this model is of type 'pixtral'; supported are 'clip_vision_model'" in said


def test_a_tower_that_lacks_weights_with_two_front_ends(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "vision_tower" in name and "layers.0" in name)]
    save_file(weights, tmp_path / "model.safetensors")
    said = refusal(tmp_path, *PRUNING, "--api-server-count", "2")
    assert "lacks 1 of the" in said


def test_features_that_are_not_finite_fail_their_request_only(
    start: Callable[..., Server], model: Path, tmp_path: Path
) -> None:
    """Patch weights so large that any light overflows: a black image is fine, a white one gives NaN."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    patches = next(name for name in weights if name.endswith("patch_embedding.weight"))
    weights[patches][:] = 3e38
    save_file(weights, tmp_path / "model.safetensors")
    server = start("not-finite", *PRUNING, "--enforce-eager", model=tmp_path)
    white = Image.new("RGB", (336, 336), "white")
    for options in (None, {"energy": 1}):
        with pytest.raises(openai.InternalServerError, match="NaN or infinite features for this image"):
            server.ask(white, options=options)
    assert server.metric("eadaprune_rejected_requests_total", reason="features") == 2
    assert server.prompt_tokens("Are you still there?") > 0
