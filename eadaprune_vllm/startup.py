"""Whether a configuration of vLLM can be served with pruning, and the front end it takes."""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.encoder import TowerSpec, VisionEncoder
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.models import ARCHITECTURES
from eadaprune_vllm.options import KEY, PruneOptions, resolve

TESTED = SpecifierSet(">=0.32.0,<0.33")
SKIP_VERSION_CHECK = "EADAPRUNE_SKIP_VERSION_CHECK"

# What vLLM can be told that pruning in the front end cannot honour: (is it so?, why not).
_REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda c: c.model_config.multimodal_config.get_limit_per_prompt("image") == 0,
        "images are switched off (--language-model-only or --limit-mm-per-prompt), so there is nothing to prune",
    ),
    (
        lambda c: c.model_config.multimodal_config.enable_mm_embeds,
        "--enable-mm-embeds is not supported: precomputed embeddings are not pruned",
    ),
    (
        lambda c: c.model_config.multimodal_config.video_pruning_rate,
        "--video-pruning-rate is vLLM's own pruning of videos and cannot be combined with this plugin",
    ),
    (
        lambda c: c.model_config.multimodal_config.mm_encoder_only,
        "--mm-encoder-only is not supported: the engine has no vision tower",
    ),
    (
        lambda c: c.compilation_config.cudagraph_mm_encoder,
        "encoder CUDA graphs (cudagraph_mm_encoder) are not supported: the engine has no vision tower",
    ),
    (
        lambda c: c.ec_transfer_config,
        "encoder cache transfer (--ec-transfer-config) is not supported: the engine has no vision tower",
    ),
    (
        lambda c: c.lora_config and c.lora_config.enable_tower_connector_lora,
        "--enable-tower-connector-lora is not supported: the engine has no vision tower",
    ),
    (
        lambda c: (c.model_config.multimodal_config.get_mm_processor_device_type() or "cpu") != "cpu",
        "an image processor on the accelerator (--mm-processor-device) is not supported",
    ),
]


def check_version() -> None:
    """Raises:
    StartupError: if vLLM is not of a tested version and the check was not switched off.
    """
    import vllm

    if not TESTED.contains(vllm.__version__, prereleases=True) and not os.environ.get(SKIP_VERSION_CHECK):
        raise StartupError(
            f"vLLM {vllm.__version__} is not supported; tested is {TESTED} "
            f"(set {SKIP_VERSION_CHECK}=1 to try it all the same)"
        )


def check_model(model_config: Any) -> None:
    """Raises:
    StartupError: if the model that vLLM would run is not one of ours.
    """
    if model_config.architecture not in ARCHITECTURES:
        raise StartupError(
            f"the architecture {model_config.architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )


def check_flags(vllm_config: Any) -> None:
    """Raises:
    StartupError: if vLLM was told something that pruning in the front end cannot honour.
    """
    import vllm.envs as envs

    if envs.VLLM_USE_RUST_FRONTEND:
        raise StartupError("the Rust front end (VLLM_USE_RUST_FRONTEND) is not supported: it runs no Python plugin")
    for applies, reason in _REFUSED:
        if applies(vllm_config):
            raise StartupError(reason)


def server_options(given: object) -> PruneOptions:
    """The server's defaults, from flags and ``--mm-processor-kwargs``.

    Raises:
        StartupError: naming option, value and allowed range.
    """
    try:
        return resolve(PruneOptions(), given, where=KEY)
    except InvalidOptionsError as error:
        raise StartupError(str(error)) from None


def _checkpoint(vllm_config: Any) -> Checkpoint:
    """Where vLLM reads the served model's weights from."""
    model, load = vllm_config.model_config, vllm_config.load_config
    return Checkpoint(
        model=model.model,
        revision=model.revision,
        download_dir=load.download_dir,
        load_format=str(load.load_format),
        # CPUs have no fast float16 kernels; float32 is quicker and no less exact. The rows are cast on their way out.
        dtype=torch.float32 if model.dtype == torch.float16 else model.dtype,
        token=model.hf_token,
    )


def check_tower(vllm_config: Any) -> None:
    """Raises:
    StartupError: if the vision tower is of an unsupported kind or its weights are not all there.
    """
    _checkpoint(vllm_config).check(TowerSpec.of(vllm_config.model_config.hf_config))


def front_end(vllm_config: Any) -> FrontEnd:
    """Load the tower into this process.

    Raises:
        StartupError: if it cannot be loaded.
    """
    model = vllm_config.model_config
    spec = TowerSpec.of(model.hf_config)
    encoder = VisionEncoder(spec, _checkpoint(vllm_config).load(spec))
    encoder.warm_up()
    return FrontEnd(encoder, _metrics(), model.served_model_name, kv_bytes_per_token(vllm_config))


@functools.cache
def _metrics() -> Metrics:
    """The metrics of this process; a registry takes each name once."""
    return Metrics()


def kv_bytes_per_token(vllm_config: Any) -> int:
    """KV cache of one token: a key and a value per KV head and layer, in the cache's dtype."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    dtype: torch.dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
    heads, layers = model.get_total_num_kv_heads(), model.get_total_num_hidden_layers()
    return int(2 * layers * heads * model.get_head_size() * dtype.itemsize)
