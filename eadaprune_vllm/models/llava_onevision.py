"""LLaVA-OneVision (SigLIP tower over tiles or frames, then a projector, then interpolation or pooling).

What comes after the projector mixes tokens, so the front end runs all of it, and the engine is sent rows of its
language model.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from vllm.config import VllmConfig
from vllm.model_executor.models import llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.llava_next import LlavaNextVisionEncoder
from eadaprune_vllm.models.towerless import MaxTokens, Towerless, instead, nothing, without
from eadaprune_vllm.prune import Encoding, Newlines
from eadaprune_vllm.selectors import VisualTokens


class LlavaOnevisionVisionEncoder(LlavaNextVisionEncoder):
    """LLaVA-NeXT's, and the projector; videos too, each frame of which is pooled."""

    modalities = ("image", "video")
    projected = True
    newline_is_argument = True
    model: Any = llava_onevision.LlavaOnevisionForConditionalGeneration

    def __init__(self, hf_config: Any) -> None:
        super().__init__(hf_config)
        self.multi_modal_projector = LlavaOnevisionMultiModalProjector(hf_config)
        self.image_newline = torch.nn.Parameter(torch.zeros(self.row_width(hf_config)))

    @property
    def newline(self) -> torch.Tensor:
        return self.image_newline

    @classmethod
    def row_width(cls, hf_config: Any) -> int:
        return int(hf_config.text_config.hidden_size)

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        if "pixel_values" in inputs:
            features, attention = self.tower(inputs["pixel_values"][0])
            return self.tiled(self.multi_modal_projector(features), attention, inputs["image_sizes"][0])
        features, attention = self.tower(inputs["pixel_values_videos"][0])
        model = SimpleNamespace(config=self.hf_config)
        features = self.model.apply_pooling(model, self.multi_modal_projector(features))
        attention = self.model.apply_pooling(model, attention[..., None])
        frames, length, _ = features.shape
        part = torch.arange(frames).repeat_interleave(length)
        side = round(length**0.5)
        last = torch.arange(len(part) + 1) == len(part)
        return Encoding(
            VisualTokens(features.flatten(0, 1), attention.flatten()),
            part,
            ((side, side),) * frames,
            newlines=Newlines(last, torch.zeros_like(part), self.newline),
        )


class PrunedLlavaOnevisionProcessingInfo(MaxTokens, llava_onevision.LlavaOnevisionProcessingInfo):
    """LLaVA-OneVision's."""


class PrunedLlavaOnevisionProcessor(PruningProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=PrunedLlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevisionForConditionalGeneration(Towerless, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """Modifications:
    - has neither vision tower nor projector nor newline, and skips their weights
    """

    encoder = LlavaOnevisionVisionEncoder
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(
        llava_onevision.LlavaOnevisionForConditionalGeneration,
        "vision_tower.",
        "multi_modal_projector.",
        "image_newline",
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with instead(llava_onevision, init_vision_tower_for_llava=nothing, LlavaOnevisionMultiModalProjector=nothing):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        del self.image_newline
