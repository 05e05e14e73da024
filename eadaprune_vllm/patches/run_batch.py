"""``vllm run-batch``: requests from a file, without HTTP routes."""

from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import RequestContext, request_context
from eadaprune_vllm.frontend.request_options import option_fields, reject_extra_body
from eadaprune_vllm.http.endpoints import ENDPOINTS
from eadaprune_vllm.patching import wrap


def install() -> None:
    from vllm.exceptions import VLLMValidationError

    # vLLM writes an exception of the function as the error of this line.
    @wrap("vllm.entrypoints.launchers.run_batch:run_request")
    async def run_request(original: Any, serving_engine_func: Any, request: Any, *args: Any) -> Any:
        extra = request.body.model_extra or {}

        async def checked(body: Any) -> Any:
            try:
                reject_extra_body(extra)
            except InvalidOptionsError as error:
                raise VLLMValidationError(str(error), parameter=error.field) from None
            if request.url not in ENDPOINTS and any(option_fields(body.model_dump())):
                raise VLLMValidationError(f"{KEY} does nothing at {request.url}", parameter=KEY)
            return await serving_engine_func(body)

        context = RequestContext(options=extra.get(KEY))
        with request_context(context):
            output = await original(checked, request, *args)
        if (report := context.report()) and output.response.body:
            setattr(output.response.body, KEY, report)
        return output
