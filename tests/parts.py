"""What small checkpoints are made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
)

from eadaprune_vllm.demo.model import byte_tokenizer

ORIGINAL = "transformers"  # where within its folder a checkpoint is that another was made of
SIDE, PATCH = 112, 14  # of a tile: 64 tokens
TILES = [[112, 224], [224, 112], [224, 224], [112, 336], [336, 112]]
_TEXT = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'].upper() }}}}: "
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] in ('image', 'image_url') %}}{image}"
    "{{% elif part['type'] in ('video', 'video_url') %}}{video}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}} {{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)
# Layers of a language model of Qwen3.5's.
LINEAR = ["linear_attention", "linear_attention", "full_attention"]
FULL = ["full_attention"] * 3
LLAVA = byte_tokenizer("<image>", "<video>")


def text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return _TEXT | {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen3_5_settings(layers: list[str]) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return {
        "rope_parameters": rope | {"partial_rotary_factor": 0.25},
        "head_dim": 32,
        "layer_types": layers,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }


def tower_config(config: Any, side: int = SIDE, **more: Any) -> Any:
    return config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        **more,
    )


def original(folder: Path) -> Path:
    """What transformers reads of a checkpoint."""
    within = folder / ORIGINAL
    return within if within.exists() else folder


def set_aside(folder: Path) -> Path:
    """Make room for another checkpoint in the folder of one, which stays within it."""
    files = [file for file in folder.iterdir() if file.is_file()]
    within = folder / ORIGINAL
    within.mkdir()
    for file in files:
        file.rename(within / file.name)
    return within


def renamed(name: str, names: Mapping[str, str]) -> str:
    """The name of a weight with each of these words instead of another."""
    for one, other in names.items():
        name = name.replace(one, other)
    return name
