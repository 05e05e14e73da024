"""Small checkpoints of every supported architecture, with random weights: they show that the plumbing works."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generic_families import GENERIC, UNLISTED
from grid_families import GRIDS
from huggingface_hub import save_torch_state_dict
from internvl_chat import opengvlab
from kimi import hub_name, kimi_k25, kimi_vl
from llava_families import LLAVAS
from llava_onevision2 import lmms_lab
from mistral_format import mistral, mistral3, pixtral
from molmo2 import ai2, molmo2
from safetensors.torch import load_file, save_file

from eadaprune_vllm.demo.model import random_model

FAMILIES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    **LLAVAS,
    **GENERIC,
    "mistral3": mistral3,
    "molmo2": molmo2,
    "pixtral": pixtral,
    **GRIDS,
}

# Of these the checkpoint is of several files, with the names of transformers 4.52 and later.
LATER = ("llava_next_mistral", "qwen2_vl")
# What makes of these checkpoints those that others publish, of which some bring code of their own.
PUBLISHED: dict[str, Callable[[Path], None]] = {
    "internvl_chat": opengvlab,
    "kimi_k25": kimi_k25,
    "kimi_vl": kimi_vl,
    "llava_onevision2": lmms_lab,
    "molmo2": ai2,
    "pixtral": mistral,
}
OWN_CODE = ("internvl_chat", "kimi_vl", "llava_onevision2", "molmo2")
WITHOUT_IMAGE = ("llava_next_video",)
WITHOUT_VIDEO = (
    *("llava", "llava_siglip", "llava_next", "llava_next_mistral"),
    *("gemma3", "kimi_k25", "kimi_vl", "mistral3", "paddleocr_vl", "pixtral"),
)
# Kept tokens of these have the positions that they have unpruned.
UNPRUNED = tuple(name for name in FAMILIES if name.startswith(("glm", "minicpmv4_7", "paddleocr", "qwen")))
# Most layers of these have linear attention, which vLLM has in bfloat16 only on a CPU. Others are the same models with
# full attention in all layers; vLLM takes them without prefix cache.
HYBRID = ("minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe")
ALL_FULL = ("minicpmv4_6_full", "minicpmv4_7_full", "qwen3_5_full")
LATENT = ("kimi_k25", "kimi_vl")  # whose attention vLLM has without chunks and prefix cache on a CPU, and of one size
BIDIRECTIONAL = ("gemma3", "gemma4", "gemma4_unified", "molmo2")  # or so vLLM takes it, and never cuts their images
NOT_TOGETHER = ("llava_onevision",)  # are videos of different lengths: vLLM, stock or not, fails over both in a step
ONE_VIDEO = ("glm4v", "glm4v_moe", "glm_ocr", "molmo2")  # is the most that vLLM lets them have in a prompt


def _hub(name: str, weight: torch.Tensor, tower: str) -> tuple[str, torch.Tensor]:
    """A weight that transformers saves as the hub has it."""
    if ".experts." in name and weight.ndim == 3:
        weight = weight.transpose(1, 2).contiguous()
    if tower in ("clip_vision_model", "siglip_vision_model"):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if tower == "kimi_k25_vision":
        name = hub_name(name)
    return name, weight


def later_name(name: str) -> str:
    """The name of a weight in checkpoints saved by transformers 4.52 and later."""
    if name.startswith(("visual.", "vision_tower.", "multi_modal_projector.", "image_newline")):
        return f"model.{name}"
    if name.startswith("language_model."):
        return name.replace("language_model.model.", "model.language_model.").removeprefix("language_model.")
    return re.sub(r"^model\.(?!language_model|visual)", "model.language_model.", name)


def make_family(name: str, folder: Path) -> Path:
    """Write a checkpoint, its weights named as on the hub, which is what vLLM's loaders know."""
    model_class, config, processor = (FAMILIES | UNLISTED)[name]()
    config.dtype = torch.bfloat16
    config.architectures = [model_class.__name__]
    random_model(model_class, config).to(torch.bfloat16).save_pretrained(folder)
    single = folder / "model.safetensors"
    tower = config.vision_config.model_type
    weights = dict(_hub(stored, weight, tower) for stored, weight in load_file(single).items())
    single.unlink()
    if name in LATER:
        weights = {later_name(stored): weight for stored, weight in weights.items()}
    save_torch_state_dict(weights, folder, max_shard_size="300KB" if name in LATER else "5GB")
    processor.save_pretrained(folder)
    if name in PUBLISHED:
        PUBLISHED[name](folder)
    return folder


def quantize(model: Path, folder: Path) -> Path:
    """Write a checkpoint whose language model is AWQ's, of random weights, and whose tower is left in 16 bit."""
    shutil.copytree(model, folder)
    weights: dict[str, torch.Tensor] = {}
    group = 32
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)

    for name, weight in load_file(model / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("_proj.weight"):
            weights[name] = weight
            continue
        (wide, long), layer = weight.shape, name.removesuffix("weight")
        weights[f"{layer}qweight"] = integers(long, wide // 8)
        weights[f"{layer}qzeros"] = integers(long // group, wide // 8)
        weights[f"{layer}scales"] = torch.rand(long // group, wide, generator=generator).half() / 100
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    awq = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    config["quantization_config"] = awq | {"modules_to_not_convert": ["visual"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_lora(model: Path, folder: Path, *modules: str) -> None:
    """Write an adapter of a model with random weights for all its linear layers that are called so."""
    weights: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(model / "model.safetensors").items():
        if any(name.endswith(f"{module}.weight") for module in modules):
            before = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{before}.lora_A.weight"] = torch.randn(8, weight.shape[1], generator=generator) * 0.2
            weights[f"{before}.lora_B.weight"] = torch.randn(weight.shape[0], 8, generator=generator) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
