"""Speculative decoding: what is drafted changes how fast an answer comes, and not the answer, pruned or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Start
from harness import Server
from PIL import Image
from safetensors.torch import load_file, save_file
from shared import noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "4", "--enforce-eager", "--dtype", "float32"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 2}']
OPTIONS: list[dict[str, Any]] = [
    {"energy": 1.0},
    {"energy": 0.9},
    {"energy": 0.97, "selector": "attention"},
    {"energy": 0.9},  # from caches
]
Images = dict[str, Image.Image]


def text_config(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())["text_config"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    own = {name: config[name] for name in (*names, "num_hidden_layers", "max_position_embeddings")}
    return own | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}


def eagle(model: Path, folder: Path) -> dict[str, Any]:
    """A head with random weights."""
    config = text_config(model) | {"num_hidden_layers": 1}
    wide, inner = config["hidden_size"], config["intermediate_size"]
    keys = wide // config["num_attention_heads"] * config["num_key_value_heads"]
    attention, mlp = "layers.0.self_attn", "layers.0.mlp"
    shapes = {"fc": (wide, 2 * wide)}
    shapes |= {
        f"{attention}.{name}_proj": (rows, wide) for name, rows in zip("qkvo", (wide, keys, keys, wide), strict=True)
    }
    shapes |= {f"{mlp}.gate_proj": (inner, wide), f"{mlp}.up_proj": (inner, wide), f"{mlp}.down_proj": (wide, inner)}
    weights = {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(wide)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": 2}


def draft_model(model: Path, folder: Path) -> dict[str, Any]:
    """The model's own language model, to which placeholders are words."""
    weights, prefix = load_file(model / "model.safetensors"), "language_model."
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(text_config(model)))
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    save_file(own, folder / "model.safetensors")
    return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}


def ngram(model: Path, folder: Path) -> dict[str, Any]:
    return {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def answers(server: Server, images: Images) -> list[tuple[int, str | None]]:
    """Tokens of prompts and long answers."""
    found = []
    for parts in ([images["astronaut"]], [images["coffee"], "and", noise(3, 200)]):
        for options in OPTIONS:
            answer = server.ask(*parts, "What is it?", options=options, max_tokens=48)
            assert answer.usage
            found.append((answer.usage.prompt_tokens, answer.choices[0].message.content))
    return found


@pytest.fixture(scope="module")
def plain(start: Start, family: Callable[[str], Path], images: Images) -> dict[str, list[tuple[int, str | None]]]:
    """What two models answer without speculation: one numbers positions by tokens, one has M-RoPE."""
    found = {}
    for name in ("llava", "qwen2_5_vl"):
        with start(f"plain-{name}", *FLAGS, model=family(name)) as server:
            found[name] = answers(server, images)
    return found


@pytest.mark.parametrize(
    ("name", "drafter"), [("llava", ngram), ("llava", draft_model), ("llava", eagle), ("qwen2_5_vl", eagle)]
)
def test_answers_are_those_without_it(
    start: Start,
    family: Callable[[str], Path],
    tmp_path: Path,
    images: Images,
    plain: dict[str, list[tuple[int, str | None]]],
    name: str,
    drafter: Callable[[Path, Path], dict[str, Any]],
) -> None:
    config = json.dumps(drafter(family(name), tmp_path / "drafter"))
    with start(f"{drafter.__name__}-{name}", *FLAGS, "--speculative-config", config, model=family(name)) as server:
        assert answers(server, images) == plain[name]
        assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 100
        # Of a head with random weights hardly any is accepted.
        assert drafter is eagle or server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
