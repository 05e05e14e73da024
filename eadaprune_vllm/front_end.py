"""What a front-end process holds: the vision encoder, a memo of its latest encodings, and the metrics."""

import hashlib
import pickle
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

import torch
from cachetools import LRUCache

from eadaprune_vllm.encoder import VisionEncoder
from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Encoding, Kept, prune
from eadaprune_vllm.report import Pruning

# For a request that repeats an image, and for the same image on its way through /tokenize and chat: about 25 images of
# LLaVA-1.5. What is larger than all of it is not kept.
MEMO_BYTES = 64 * 2**20


class FrontEnd:
    """Encodes, prunes and counts for one served model. Thread-safe: vLLM renders on more than one thread.

    Args:
        encoder: the vision encoder.
        dtype: the model's, which the rows are shipped in.
        metrics: where to count.
        model_name: label of the metrics.
        kv_bytes_per_token: KV cache that one token takes, over all layers.
    """

    def __init__(
        self, encoder: VisionEncoder, dtype: torch.dtype, metrics: Metrics, model_name: str, kv_bytes_per_token: int
    ) -> None:
        self.encoder = encoder
        self.dtype = dtype
        self.metrics = metrics
        self.model_name = model_name
        self.kv_bytes_per_token = kv_bytes_per_token
        self._memo: LRUCache[bytes, Encoding] = LRUCache(MEMO_BYTES, getsizeof=lambda encoding: encoding.nbytes)
        self._lock = Lock()
        metrics.declare(model_name)

    def prune(self, source: Mapping[str, Any] | Encoding, options: PruneOptions) -> tuple[torch.Tensor, Kept]:
        """Args:
            source: what the encoder is fed with, of one image or video; or what was encoded elsewhere.
            options: resolved options.

        Returns:
            The rows that the engine is sent, ``[p, W]`` in the model's dtype, and the decision.

        Raises:
            NonFiniteFeaturesError: if the features are NaN or infinite.
        """
        with self._lock, self.encoder.threads():
            encoding, stages = self._encode(source)
            try:
                kept = prune(encoding, options)
                rows = encoding.rows_of(kept).to(self.dtype)
                if not rows.isfinite().all():  # float16 has less range than the tower computes in
                    raise NonFiniteFeaturesError(f"features of this image are too large for {self.dtype}")
            except NonFiniteFeaturesError:
                self.reject("features")
                raise
        stages |= {"spectrum": kept.spectrum_seconds, "select": kept.select_seconds}
        self.metrics.observe_stages(self.model_name, **stages)
        return rows, kept

    def warm_up(self, source: Mapping[str, Any] | Encoding) -> None:
        """Encode for nothing."""
        with self._lock, self.encoder.threads():
            self._encode(source)

    def preview(self, source: Mapping[str, Any] | Encoding, options: PruneOptions) -> tuple[Kept, Encoding]:
        """The decision about one image or video that enters no engine, and what it rests on; counted nowhere.

        Arguments and errors are those of ``prune``.
        """
        with self._lock, self.encoder.threads():
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
        encoding = self.encoder.encode(source)
        seconds = time.perf_counter() - start
        with suppress(ValueError):  # larger than the memo
            self._memo[key] = encoding
        return encoding, {"encode": seconds}

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
