"""What a front-end process holds: the vision encoder, a memo of its latest encodings, and the metrics."""

import hashlib
import logging
import pickle
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

import torch
from cachetools import LRUCache

from eadaprune_vllm.device import CPU, prepare
from eadaprune_vllm.encoder import VisionEncoder
from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.load import Load
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.options import Choice, PruneOptions
from eadaprune_vllm.prune import Encoding, Kept, finite, prune
from eadaprune_vllm.report import Pruning

logger = logging.getLogger("vllm." + __name__)

# For a request that repeats an image, and for the same image on its way through /tokenize and chat: about 25 images of
# LLaVA-1.5. What is larger than all of it is not kept.
MEMO_BYTES = 64 * 2**20
# Images and videos whose threshold under load is remembered, at some hundred bytes each.
REMEMBERED = 10_000


class FrontEnd:
    """Encodes, prunes and counts for one served model. Thread-safe: vLLM renders on more than one thread.

    Args:
        encoder: the vision encoder.
        dtype: the model's, which the rows are shipped in.
        metrics: where to count.
        model_name: label of the metrics.
        kv_bytes_per_token: KV cache that one token takes, over all layers.
        load: of the server, if thresholds follow it.
        device: where the encoder runs once the engine is ready; until then it is on the CPU.
        gpu_bytes: the most that torch may take of that device in this process, if there is a limit.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        dtype: torch.dtype,
        metrics: Metrics,
        model_name: str,
        kv_bytes_per_token: int,
        load: Load | None = None,
        device: torch.device = CPU,
        gpu_bytes: int | None = None,
    ) -> None:
        self.encoder = encoder
        self.dtype = dtype
        self.metrics = metrics
        self.model_name = model_name
        self.kv_bytes_per_token = kv_bytes_per_token
        self.load = load
        self.device = device
        self.gpu_bytes = gpu_bytes
        self._in_force: LRUCache[tuple[str, str], PruneOptions] = LRUCache(REMEMBERED)
        self._memo: LRUCache[bytes, Encoding] = LRUCache(MEMO_BYTES, getsizeof=lambda encoding: encoding.nbytes)
        self._lock = Lock()
        metrics.declare(model_name)

    def prune(
        self, source: Mapping[str, Any] | Encoding, options: PruneOptions
    ) -> tuple[torch.Tensor, Kept, dict[str, float]]:
        """Args:
            source: what the encoder is fed with, of one image or video; or what was encoded elsewhere.
            options: resolved options.

        Returns:
            The rows that the engine is sent, ``[p, W]`` in the model's dtype, the decision, and how many seconds each
            stage took.

        Raises:
            NonFiniteFeaturesError: if the features are NaN or infinite.
        """
        with self._lock, self.encoder.threads():
            self._place()
            encoding, stages = self._encode(source)
            try:
                kept = prune(encoding, options)
                rows = encoding.rows_of(kept).to(self.dtype)
                if not finite(rows):  # float16 has less range than the tower computes in
                    raise NonFiniteFeaturesError(f"features of this image are too large for {self.dtype}")
            except NonFiniteFeaturesError:
                self.reject("features")
                raise
        stages |= {"spectrum": kept.spectrum_seconds, "select": kept.select_seconds}
        self.metrics.observe_stages(self.model_name, **stages)
        return rows, kept, stages

    def place(self) -> bool:
        """Move the encoder to its device, if it is not there. The engine must be ready: until then it would take what
        others use of its GPU for its own. What is pruned comes later than that, and calls this too.

        Returns:
            Whether it moved.

        Raises:
            torch.OutOfMemoryError: if it does not fit.
        """
        with self._lock:
            return self._place()

    def _place(self) -> bool:
        if self.encoder.device == self.device:
            return False
        prepare(self.device, self.gpu_bytes)
        self.encoder.to(self.device)
        # What was encoded on the CPU may have another budget than the same image here.
        self._memo.clear()
        logger.info("Vision tower moved to %s", self.device)
        return True

    def warm_up(self, source: Mapping[str, Any] | Encoding) -> None:
        """Encode for nothing, wherever the encoder is."""
        with self._lock, self.encoder.threads():
            self._encode(source)

    def preview(self, source: Mapping[str, Any] | Encoding, options: PruneOptions) -> tuple[Kept, Encoding]:
        """The decision about one image or video that enters no engine, and what it rests on; counted nowhere.

        Arguments and errors are those of ``prune``.
        """
        with self._lock, self.encoder.threads():
            self._place()
            encoding, _ = self._encode(source)
            kept = prune(encoding, options)
            encoding.spectrum(options.scope)
            return kept, encoding

    def _encode(self, source: Mapping[str, Any] | Encoding) -> tuple[Encoding, dict[str, float]]:
        """The encoding, and the time it took if it was not at hand."""
        if isinstance(source, Encoding):
            return source, {}
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(source.items()):
            digest.update(name.encode())
            _digest(digest, value)
        key = digest.digest()
        if key in self._memo:
            return self._memo[key], {}
        start = time.perf_counter()
        encoding: Encoding = self.encoder(source)
        seconds = time.perf_counter() - start
        with suppress(ValueError):  # larger than the memo
            self._memo[key] = encoding
        return encoding, {"encode": seconds}

    def in_force(self, choice: Choice, identity: str, held: bool) -> PruneOptions:
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
            options = self._in_force.get(key) if held else None
            self._in_force[key] = options = options or choice.at(self.load.level)
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

    def reject(self, reason: str) -> None:
        """Count a request that is refused."""
        self.metrics.count_rejected(self.model_name, reason)


def _digest(digest: Any, value: Any) -> None:
    """Add a value to a hash: tensors, also in lists, and whatever can be pickled."""
    if isinstance(value, torch.Tensor):
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, list | tuple):
        for item in value:
            _digest(digest, item)
    else:
        digest.update(pickle.dumps(value))
