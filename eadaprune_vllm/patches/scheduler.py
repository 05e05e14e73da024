"""vLLM's scheduler: requests that other instances go on with return the decisions about their images and videos, and
preempted requests can be encoded again."""

from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.frontend.transfer import EC_PARAMS, KV_PARAMS
from eadaprune_vllm.patching import wrap


def install() -> None:
    @wrap("vllm.v1.core.sched.scheduler:Scheduler._free_request")
    def free_request(original: Any, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        kv_params, ec_params = original(scheduler, request, *args, **kwargs)
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        own = extra[KEY] if isinstance(extra.get(KEY), dict) else {}
        if kv_params and KV_PARAMS in own:
            kv_params = {**kv_params, KEY: own[KV_PARAMS]}
        for identifier, item in own.get(EC_PARAMS, {}).items():
            if ec_params and identifier in ec_params:
                ec_params[identifier][KEY] = item
        return kv_params, ec_params

    # vLLM sends workers no pixels of an image whose tokens are all cached, or loaded from another instance. If such a
    # request is preempted and loses its blocks, the first model runner must encode the image without them, and dies.
    @wrap("vllm.v1.core.sched.output:NewRequestData.from_request")
    def from_request(
        original: Any, cls: Any, request: Any, block_ids: Any, prefill_token_ids: Any = None, **kwargs: Any
    ) -> Any:
        data = original(cls, request, block_ids, prefill_token_ids, **kwargs)
        if prefill_token_ids is None:  # these are for the second one, to which preempted requests are new
            data.mm_features = request.mm_features
        return data
