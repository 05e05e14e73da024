"""The vision tower in the front-end process: transformers' own model, only as deep as the feature layer needs.

Torch and transformers only. One image per call: bf16 matrix products are not batch-invariant, and the budget
must be a pure function of the image.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel, SiglipVisionModel

from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.selectors import VisualTokens

# A tower of this size stops gaining from more threads; the engine needs the other cores.
MAX_THREADS = 16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tower computes in on this CPU where the model's dtype is ``dtype``.

    No CPU has fast float16 kernels, and not every one has instructions for bfloat16; without them float32 is several
    times faster, and no less exact.
    """
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype if dtype == torch.bfloat16 and native else torch.float32


@dataclass(frozen=True)
class TowerSpec:
    """Which tower a LLaVA-like model has, and what of it feeds the projector.

    Attributes:
        model_class: transformers' class of the tower.
        config: the tower's configuration, cut to the layers in use.
        has_cls: whether row 0 of the tower's output is a CLS token.
        first: number of leading rows that the projector is not fed with.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    has_cls: bool
    first: int

    @classmethod
    def of(cls, hf_config: Any) -> "TowerSpec":
        """Read it off a model's configuration (``vision_config``, ``vision_feature_layer`` and
        ``vision_feature_select_strategy``).

        Raises:
            StartupError: if the tower or the layer is not supported.
        """
        towers = {"clip_vision_model": (CLIPVisionModel, True), "siglip_vision_model": (SiglipVisionModel, False)}
        vision = hf_config.vision_config
        if vision.model_type not in towers:
            raise StartupError(
                f"the vision tower of this model is of type {vision.model_type!r}; supported are "
                + ", ".join(map(repr, towers))
            )
        layer = hf_config.vision_feature_layer
        if not isinstance(layer, int):
            raise StartupError(f"vision_feature_layer={layer!r} is not supported; it must be one integer")
        depth = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        if not 1 <= depth <= vision.num_hidden_layers:
            raise StartupError(
                f"vision_feature_layer={layer} names no layer of a tower with {vision.num_hidden_layers} layers"
            )
        model_class, has_cls = towers[vision.model_type]
        config = copy(vision)
        config.num_hidden_layers = depth
        config.vision_use_head = False  # SigLIP's pooling head is not used
        return cls(model_class, config, has_cls, first=int(hf_config.vision_feature_select_strategy == "default"))

    @property
    def grid(self) -> int:
        """Patches per side of the image."""
        return int(self.config.image_size // self.config.patch_size)

    def build(self) -> PreTrainedModel:
        """The tower with freshly initialised float32 weights (on the default device).

        The final norm is left out: the projector is fed with the last layer's plain output, as in vLLM.
        """
        tower = self.model_class(self.config)
        tower.post_layernorm = torch.nn.Identity()
        return tower.eval().requires_grad_(False)


class VisionEncoder:
    """Encodes one image at a time on the CPU.

    Args:
        spec: what the tower is.
        tower: the tower, with its weights.
        num_threads: torch threads of one encoding; by default what this process may use, at most ``MAX_THREADS``.
            Fixed for the life of the encoder.
    """

    def __init__(self, spec: TowerSpec, tower: PreTrainedModel, num_threads: int | None = None) -> None:
        self.spec = spec
        self.tower = tower
        self.num_threads = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> VisualTokens:
        """Args:
            pixel_values: ``[1, 3, H, W]``, as the model's image processor makes them.

        Returns:
            Features in the tower's dtype and the attention each draws: that of the CLS token in the last used
            layer, averaged over heads; in towers without one that of all tokens, averaged over heads and queries.
        """
        assert pixel_values.shape[0] == 1, "one image per call"
        attention = self.tower.encoder.layers[-1].self_attn
        with self.threads(), _outputs(attention.q_proj, attention.k_proj) as projections:
            hidden = self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state[0]
            query, key = (
                projection[0].float().view(-1, attention.num_heads, attention.head_dim).transpose(0, 1)
                for projection in projections
            )
            if self.spec.has_cls:
                query = query[:, :1]
            weights = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)
        first = self.spec.first
        return VisualTokens(hidden[first:].contiguous(), weights.mean((0, 1))[first:])

    def warm_up(self) -> None:
        """Encode a blank image, so that the first request does not pay for what torch sets up once."""
        size = self.spec.config.image_size
        self.encode(torch.zeros(1, 3, size, size))

    @contextmanager
    def threads(self) -> Iterator[None]:
        """While open, torch computes with this encoder's number of threads: results may depend on it."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def _outputs(*modules: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what each module returns while the context is open, in the order of the calls."""
    collected: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _, __, output: collected.append(output)) for module in modules]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
