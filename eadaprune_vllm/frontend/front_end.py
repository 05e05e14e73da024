"""The state of a front-end process: its decision client, pending items, load and metrics."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from cachetools import LRUCache
from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.report import Pruning, Timing
from eadaprune_vllm.core.server_info import Reference
from eadaprune_vllm.core.server_options import Choice, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.load import Load
from eadaprune_vllm.frontend.metrics import Metrics, Source
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.shared_table import table
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse

# Items whose options under load are remembered, at some hundred bytes each.
MAX_REMEMBERED = 10_000


class FrontEnd:
    """The front end of one served model. Thread-safe: vLLM renders on more than one thread.

    Args:
        decision_client: sends decision requests to the engines.
        metrics: of this process.
        model_name: label of the metrics.
        kv_bytes_per_token: KV cache of one token, over all layers, in bytes.
        load: of the server, if thresholds follow it.
        weights_file: shared by the front ends of one server; None if there is only one front end.

    Attributes:
        pending: by ``mm_hash``, the pending items of requests in progress, which other requests share.
    """

    def __init__(
        self,
        decision_client: DecisionClient,
        metrics: Metrics,
        model_name: str,
        kv_bytes_per_token: int,
        load: Load | None = None,
        weights_file: Path | None = None,
    ) -> None:
        self.decision_client = decision_client
        self.metrics = metrics
        self.model_name = model_name
        self.kv_bytes_per_token = kv_bytes_per_token
        self.load = load
        self._effective_options: LRUCache[tuple[str, str], PruneOptions] = LRUCache(MAX_REMEMBERED)
        self._lock = Lock()
        self.pending: WeakValueDictionary[str, PendingItem] = WeakValueDictionary()
        self._weights_changed_at = table(1, weights_file)
        metrics.declare(model_name)

    def connect(self, client: Any, options: ServerOptions) -> None:
        """Connect to the engines, once they serve.

        Args:
            client: vLLM's engine client.
            options: the operator's, with curves.
        """
        self.decision_client.connect(client)
        self.metrics.set_defaults(self.model_name, options.resolve(), Reference.of(options))

    @property
    def weights_changed_at(self) -> float:
        """When the model's weights last changed, in seconds since the epoch; 0 if never."""
        return float(self._weights_changed_at[0])

    def weights_changed(self) -> None:
        """Have all front ends of this server discard embeddings and decisions of the weights before."""
        self._weights_changed_at[0] = time.time()

    async def decide(self, new: Sequence[PendingItem], source: Source = "request") -> None:
        """Get decisions about these items, up to the first error."""
        started, (left, requests) = time.time_ns(), _undecided(new)
        self._set_responses(left, source, started, await self.decision_client.decide(requests))

    def decide_sync(self, new: Sequence[PendingItem], source: Source = "request") -> None:
        """``decide`` for threads that may block."""
        started, (left, requests) = time.time_ns(), _undecided(new)
        self._set_responses(left, source, started, self.decision_client.decide_sync(requests))

    def _set_responses(
        self, new: Sequence[PendingItem], source: Source, started: int, responses: Sequence[DecisionResponse]
    ) -> None:
        for each, response in zip(new, responses, strict=False):
            if isinstance(response, DecisionError):
                self.reject(response.reason, source)
            elif not each.response:  # otherwise another request counted it
                each.timing = Timing(each.request.modality, started, response.seconds)
                self.metrics.observe_stages(self.model_name, source, **response.seconds)
            each.set_response(response)

    def effective_options(self, choice: Choice, item: str, sticky: bool) -> PruneOptions:
        """The options of one image or video at the current load.

        Args:
            choice: its options without load.
            item: identifies the image or video.
            sticky: whether it keeps the threshold that it had last: because the request has no data to encode, or
                because a lower threshold would invalidate the cached prefix of the conversation.
        """
        if not self.load:
            return choice.options
        key = item, choice.options.key
        with self._lock:
            options = self._effective_options.get(key) if sticky else None
            self._effective_options[key] = options = options or choice.at(self.load.level)
        return options

    def observe_load(self, engine: int, kv_usage: float, waiting: int) -> None:
        """Take in an engine's report after a step: KV cache usage (0 to 1), waiting requests."""
        assert self.load
        self.load.observe(engine, kv_usage, waiting)
        self.show_load()

    def show_load(self) -> None:
        """Update the metric. The level falls by itself once engines stop reporting."""
        assert self.load
        self.metrics.set_load_level(self.model_name, self.load.level)

    def admit(self, pruning: Pruning) -> None:
        """Count the images and videos of a prompt that enters the engine."""
        self.metrics.count(self.model_name, pruning)

    def reject(self, reason: str, source: Source = "request") -> None:
        """Count a rejected request."""
        self.metrics.count_rejected(self.model_name, reason, source)

    @contextmanager
    def refusals(self, source: Source = "request") -> Iterator[None]:
        """Context manager that counts invalid options, and turns them into vLLM's error, a 400."""
        try:
            yield
        except InvalidOptionsError as error:
            self.reject("options", source)
            raise VLLMValidationError(str(error), parameter=error.field) from None


def _undecided(new: Sequence[PendingItem]) -> tuple[list[PendingItem], list[DecisionRequest]]:
    """The items without a response, and their decision requests. Another request, with the same image, may have set a
    response since these items were found undecided, and a decided item has no pixels any more."""
    # The request is read before the response: ``set_response`` sets the response first.
    requests = [(each, each.request) for each in new]
    left = [(each, request) for each, request in requests if not each.response]
    return [each for each, _ in left], [request for _, request in left]
