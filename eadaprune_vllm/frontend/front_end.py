"""What a front-end process holds: whom it asks, the thresholds that follow the load, and the metrics."""

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
from eadaprune_vllm.core.report import Pruning, Reference, Timing
from eadaprune_vllm.core.server_options import Choice, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.load import Load
from eadaprune_vllm.frontend.metrics import Metrics, Source
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.shared_table import table
from eadaprune_vllm.messages import DecisionError, DecisionResponse

# Images and videos whose threshold under load is remembered, at some hundred bytes each.
REMEMBERED = 10_000


class FrontEnd:
    """Asks and counts for one served model. Thread-safe: vLLM renders on more than one thread.

    Args:
        decision_client: asks the engine.
        metrics: where to count.
        model_name: label of the metrics.
        kv_bytes_per_token: KV cache that one token takes, over all layers.
        load: of the server, if thresholds follow it.
        weights: a file in which the front ends of one server share when weights changed; None if there is only one.

    Attributes:
        pending: by ``mm_hash``, what requests in progress have read, for others with the same image at the same time.
    """

    def __init__(
        self,
        decision_client: DecisionClient,
        metrics: Metrics,
        model_name: str,
        kv_bytes_per_token: int,
        load: Load | None = None,
        weights: Path | None = None,
    ) -> None:
        self.decision_client = decision_client
        self.metrics = metrics
        self.model_name = model_name
        self.kv_bytes_per_token = kv_bytes_per_token
        self.load = load
        self._effective_options: LRUCache[tuple[str, str], PruneOptions] = LRUCache(REMEMBERED)
        self._lock = Lock()
        self.pending: WeakValueDictionary[str, PendingItem] = WeakValueDictionary()
        self._weights = table(1, weights)
        metrics.declare(model_name)

    def connect(self, client: Any, options: ServerOptions) -> None:
        """To be called once engines serve.

        Args:
            client: vLLM's, of the engines.
            options: the operator's, informed.
        """
        self.decision_client.connect(client)
        self.metrics.set_defaults(self.model_name, Reference.of(options))

    @property
    def weights(self) -> float:
        """What tells the model's weights from earlier ones: when they last changed, 0 if never."""
        return float(self._weights[0])

    def weights_changed(self) -> None:
        """From now on, no front end of this server uses what other weights made."""
        self._weights[0] = time.time()

    async def decide(self, new: Sequence[PendingItem], source: Source = "request") -> None:
        """Have all of them decided, up to the first of which nothing can be."""
        started = time.time_ns()
        self._answered(new, source, started, await self.decision_client.decide([each.request for each in new]))

    def decide_sync(self, new: Sequence[PendingItem], source: Source = "request") -> None:
        """The same from a thread that may wait."""
        started = time.time_ns()
        self._answered(new, source, started, self.decision_client.decide_sync([each.request for each in new]))

    def _answered(
        self, new: Sequence[PendingItem], source: Source, started: int, answers: Sequence[DecisionResponse]
    ) -> None:
        for each, answer in zip(new, answers, strict=False):
            if isinstance(answer, DecisionError):
                self.reject(answer.reason, source)
            elif not each.response:  # or else it came to another request first
                each.timing = Timing(each.request.modality, started, answer.seconds)
                self.metrics.observe_stages(self.model_name, source, **answer.seconds)
            each.set_response(answer)

    def effective_options(self, choice: Choice, identity: str, held: bool) -> PruneOptions:
        """The options of one image or video at the present load.

        Args:
            choice: what was chosen for it.
            identity: what tells it from others.
            held: whether it keeps the threshold that it last had: because its data is not at hand, or because a
                conversation's earlier turns would have to be computed again.
        """
        if not self.load:
            return choice.options
        key = identity, choice.options.key
        with self._lock:
            options = self._effective_options.get(key) if held else None
            self._effective_options[key] = options = options or choice.at(self.load.level)
        return options

    def observe_load(self, engine: int, kv_usage: float, waiting: int) -> None:
        """Take in what an engine reports after a step: share of its KV cache in use, requests in its queue."""
        assert self.load
        self.load.observe(engine, kv_usage, waiting)
        self.show_load()

    def show_load(self) -> None:
        """Bring the metric up to date: the level falls by itself once no engine reports any more."""
        assert self.load
        self.metrics.set_load_level(self.model_name, self.load.level)

    def admit(self, pruning: Pruning) -> None:
        """Count the images and videos of a prompt that enters the engine."""
        self.metrics.count(self.model_name, pruning)

    def reject(self, reason: str, source: Source = "request") -> None:
        """Count a request that is refused."""
        self.metrics.count_rejected(self.model_name, reason, source)

    @contextmanager
    def refusals(self, source: Source = "request") -> Iterator[None]:
        """While open, invalid options are counted and become vLLM's 400."""
        try:
            yield
        except InvalidOptionsError as error:
            self.reject("options", source)
            raise VLLMValidationError(str(error), parameter=error.field) from None
