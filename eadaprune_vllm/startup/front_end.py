"""Creates the front end of a process from vLLM's configuration."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import psutil
import torch

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.load import Load
from eadaprune_vllm.frontend.metrics import Metrics

logger = logging.getLogger("vllm." + __name__)


def create_front_end(vllm_config: Any) -> FrontEnd:
    """The front end of this process.

    Raises:
        StartupError: if ``configure`` was never called.
    """
    model = vllm_config.model_config
    if not hasattr(model.multimodal_config, KEY):
        raise StartupError("only vllm serve, vllm run-batch and LLM(...) are supported, not vllm launch render")
    count = int(vllm_config.parallel_config._api_process_count)  # API servers on this node
    policy, load = ServerOptions.of(model.multimodal_config).load_aware, None
    if policy:
        parallel = vllm_config.parallel_config
        # The same number as in vLLM's engine client.
        engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
        load = Load(policy, engines, _shared_file("load", count))
    decision_client = DecisionClient(vllm_config.scheduler_config.max_num_encoder_input_tokens)
    return FrontEnd(
        decision_client,
        _metrics(),
        model.served_model_name,
        kv_bytes_per_token(vllm_config),
        load,
        _shared_file("weights", count),
    )


def _shared_file(name: str, count: int) -> Path | None:
    """A file that all API servers of this server share, and vLLM removes; None if there is only one API server."""
    if count == 1:
        return None
    # vLLM's folder for metrics. Other servers may use it too, or this one's predecessor in its container, but their API
    # servers have another parent process.
    parent = psutil.Process(os.getppid())
    return Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"{KEY}-{name}-{parent.pid}-{parent.create_time()}")


@functools.cache
def _metrics() -> Metrics:
    """The metrics of this process. A registry accepts each name once."""
    return Metrics()


def kv_bytes_per_token(vllm_config: Any) -> int:
    """KV cache of one token in bytes: a key and a value per KV head, or the latent vector of MLA, for each layer with a
    KV cache, in the cache's dtype; 0 if the size of the dtype is not known."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    name = vllm_config.cache_config.cache_dtype
    try:
        dtype: torch.dtype = kv_cache_dtype_str_to_dtype(name, model)
    except KeyError:
        logger.warning("The size of KV cache dtype %s is not known, so kv_cache_bytes_saved will be 0", name)
        return 0
    vectors = 1 if model.use_mla else 2 * model.get_total_num_kv_heads()
    layers = model.get_total_num_hidden_layers()
    layers -= (getattr(model.hf_text_config, "layer_types", None) or []).count("linear_attention")
    return int(layers * vectors * model.get_head_size() * dtype.itemsize)
