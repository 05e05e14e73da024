"""vLLM's scheduler: a request that another instance decodes returns the decisions about its images and videos."""

from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.patching import wrap


def install() -> None:
    @wrap("vllm.v1.core.sched.scheduler:Scheduler._connector_finished")
    def connector_finished(original: Any, scheduler: Any, request: Any) -> Any:
        delay_free_blocks, params = original(scheduler, request)
        given = request.kv_transfer_params
        if params and given and KEY in given:
            params = {**params, KEY: given[KEY]}
        return delay_free_blocks, params
