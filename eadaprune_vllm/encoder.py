"""The vision encoder in the front-end process: transformers' own modules, as much of them as pruning needs.

Torch and transformers only. One image per call: bf16 matrix products are not batch-invariant, and the budget
must be a pure function of the image. The tiles of an image, or the frames of a video, form its batch.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface, CLIPVisionModel, SiglipVisionModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eadaprune_vllm.device import CPU
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.prune import Encoding
from eadaprune_vllm.selectors import VisualTokens

# A tower of this size stops gaining from more threads; the engine needs the other cores.
MAX_THREADS = 16
OBSERVED = "eadaprune_observed"  # our name of an attention implementation
_OBSERVER = "_eadaprune_observer"
_ATTENTION_WEIGHTS = 2**24  # how many are held at a time


def compute_dtype(dtype: torch.dtype, device: torch.device = CPU) -> torch.dtype:
    """What a tower computes in on ``device`` where the model's dtype is ``dtype``: on a GPU in that, on this CPU in
    what it is fast at.

    No CPU has fast float16 kernels, and not every one has instructions for bfloat16; without them float32 is several
    times faster, and no less exact.
    """
    if device.type != "cpu":
        return dtype
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype if dtype == torch.bfloat16 and native else torch.float32


class VisionEncoder(torch.nn.Module, ABC):
    """What a front end runs of a model. Its weights are named as in the model's checkpoints.

    Args:
        hf_config: the model's configuration.

    Attributes:
        modalities: what it can encode.
        projected: whether the engine is sent rows past the projector.
        takes_embeddings: whether ``embedded`` can tell what embeddings mean.
        num_threads: torch threads of one encoding: what this process may use, at most ``MAX_THREADS``. Fixed for
            the life of the encoder.

    Raises:
        StartupError: if the tower, or how the model uses it, is not supported.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    projected: ClassVar[bool]
    takes_embeddings: ClassVar[bool] = False

    def __init__(self, hf_config: Any) -> None:
        super().__init__()
        self.hf_config = hf_config
        self.num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))

    @abstractmethod
    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        """Args:
        inputs: of one image or video, as the model's processor makes them, pixels in any dtype; these on the
            encoder's device, which is torch's default here, and all else on the CPU, where it is read.

        Returns:
            The encoding, on the encoder's device.
        """

    def forward(self, inputs: Mapping[str, Any]) -> Encoding:
        """``encode`` on whatever device the weights are, from and to the CPU."""
        with torch.device(self.device):
            return self.encode({name: _on(self.device, name, value) for name, value in inputs.items()}).cpu()

    @classmethod
    @abstractmethod
    def row_width(cls, hf_config: Any) -> int:
        """How many numbers the engine is sent of each token."""

    def embedded(self, embeddings: torch.Tensor, inputs: Mapping[str, Any]) -> Encoding:
        """Embeddings that a client made in our place, past the projector, as if encoded here.

        Args:
            embeddings: ``[N, W]``, of one image or video.
            inputs: what came with them.

        Raises:
            ValueError: if they are not of the shape that these say.
        """
        raise NotImplementedError("takes_embeddings says so")

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def pack(self) -> None:
        """Lay weights out for this CPU's bfloat16 kernels, if they are used, once instead of at each call."""
        capabilities = torch.cpu.get_capabilities()
        x86 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        if self.dtype != torch.bfloat16 or not x86 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return
        for module in list(self.modules()):
            for name, child in module.named_children():
                if type(child) is torch.nn.Linear:
                    setattr(module, name, PackedLinear(child))

    @contextmanager
    def threads(self) -> Iterator[None]:
        """While open, torch computes with this encoder's number of threads: results may depend on it."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class PackedLinear(torch.nn.Module):
    """What ``torch.nn.Linear`` computes in bfloat16, to the bit, by the kernel that vLLM uses on the CPU as well.

    The operators are those of torch's own compiler for frozen models.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return product


def _on(device: torch.device, name: str, value: Any) -> Any:
    """An input of that name for an encoder on ``device``. Only pixels move: whoever reads a size or a grid would have
    to wait for the GPU each time."""
    if not name.startswith("pixel_values"):
        return value
    return value.to(device) if isinstance(value, torch.Tensor) else [_on(device, name, tile) for tile in value]


class LlavaVisionEncoder(VisionEncoder):
    """The tower of a LLaVA-like model, only as deep as the layer that feeds the projector.

    The final norm is left out: the projector is fed with that layer's plain output, as in vLLM.
    """

    projected = False
    takes_embeddings = True

    def __init__(self, hf_config: Any) -> None:
        super().__init__(hf_config)
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
        model_class, self.has_cls = towers[vision.model_type]
        config = observed(vision)
        config.num_hidden_layers = depth
        config.vision_use_head = False  # SigLIP's pooling head is not used
        self.vision_tower = model_class(config)
        self.vision_tower.post_layernorm = torch.nn.Identity()
        # Leading rows that the projector is not fed with.
        self.first = int(hf_config.vision_feature_select_strategy == "default")
        self.side = int(vision.image_size // vision.patch_size)

    @classmethod
    def row_width(cls, hf_config: Any) -> int:
        return int(hf_config.vision_config.hidden_size)

    def tower(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args:
            pixel_values: ``[T, 3, H, W]``, the tiles of one image or the frames of one video.

        Returns:
            Features ``[T, N, D]`` in the tower's dtype, and the attention each draws, ``[T, N]`` float32: that of the
            CLS token in the last used layer, averaged over heads; in towers without one that of all tokens, averaged
            over heads and queries.
        """
        with observing(self.vision_tower.encoder.layers[-1].self_attn) as calls:
            hidden = self.vision_tower(pixel_values.to(self.dtype)).last_hidden_state
        ((query, key, scale),) = calls
        attention = torch.stack(
            [drawn(q[:, : 1 if self.has_cls else None], k, scale) for q, k in zip(query, key, strict=True)]
        )
        return hidden[:, self.first :].contiguous(), attention[:, self.first :]

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        (features,), (attention,) = self.tower(inputs["pixel_values"])
        return whole(VisualTokens(features, attention), (self.side, self.side))

    def embedded(self, embeddings: torch.Tensor, inputs: Mapping[str, Any]) -> Encoding:
        return whole(VisualTokens(embeddings, None), (1, len(embeddings)))


def whole(tokens: VisualTokens, grid: tuple[int, int]) -> Encoding:
    """An image that has one part and no newlines."""
    return Encoding(tokens, torch.zeros(tokens.num_tokens, dtype=torch.int64), (grid,))


def observed(vision_config: Any) -> Any:
    """A copy of a tower's configuration with attention that can be observed."""
    config = copy(vision_config)
    config._attn_implementation = OBSERVED
    return config


@contextmanager
def observing(attention: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, float]]]:
    """Collects query and key ``[B, heads, n, d]`` and scale of each call of an attention module while open."""
    calls: list[tuple[torch.Tensor, torch.Tensor, float]] = []
    setattr(attention, _OBSERVER, calls)
    try:
        yield calls
    finally:
        delattr(attention, _OBSERVER)


def _observed_attention(module: Any, query: Any, key: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
    if (calls := getattr(module, _OBSERVER, None)) is not None:
        calls.append((query, key, scaling))
    return sdpa_attention_forward(module, query, key, *args, scaling=scaling, **kwargs)


AttentionInterface.register(OBSERVED, _observed_attention)


def drawn(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """How much attention each token draws, ``[n]`` float32, averaged over heads and queries.

    Args:
        query: ``[heads, q, d]``.
        key: ``[heads, n, d]``.
        scale: of their products.
    """
    heads, queries, _ = query.shape
    keys = key.float().transpose(1, 2)
    total = torch.zeros(key.shape[1])
    for some in torch.split(query, max(1, _ATTENTION_WEIGHTS // (heads * key.shape[1])), 1):
        total += (some.float() @ keys * scale).softmax(-1).sum((0, 1))
    return total / (heads * queries)
