"""What a front-end process holds: the vision encoder, a memo of its latest encodings, and the metrics."""

import hashlib
import time
from collections.abc import Iterable
from threading import Lock

import torch
from cachetools import LRUCache

from eadaprune_vllm.encoder import VisionEncoder
from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.metrics import Metrics
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Kept, prune
from eadaprune_vllm.report import ImageReport
from eadaprune_vllm.selectors import VisualTokens
from eadaprune_vllm.spectrum import Spectrum

# Enough for a request that repeats an image, and for the same image on its way through /tokenize and chat.
MEMO_IMAGES = 16


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
        self._memo: LRUCache[bytes, VisualTokens] = LRUCache(MEMO_IMAGES)
        self._lock = Lock()
        metrics.declare(model_name)

    def prune(self, pixel_values: torch.Tensor, options: PruneOptions) -> tuple[torch.Tensor, Kept]:
        """Args:
            pixel_values: ``[1, 3, H, W]``, one image.
            options: resolved options.

        Returns:
            The kept feature rows ``[k, D]`` in the model's dtype, and the decision.

        Raises:
            NonFiniteFeaturesError: if the tower's features for this image are NaN or infinite.
        """
        with self._lock, self.encoder.threads():
            tokens, stages = self._encode(pixel_values)
            try:
                kept = prune(tokens, options)
                rows = tokens.features[kept.indices].to(self.dtype)
                if not rows.isfinite().all():  # float16 has less range than the tower computes in
                    raise NonFiniteFeaturesError(f"features of this image are too large for {self.dtype}")
            except NonFiniteFeaturesError:
                self.reject("features")
                raise
        stages |= {"spectrum": kept.spectrum_seconds, "select": kept.select_seconds}
        self.metrics.observe_stages(self.model_name, **stages)
        return rows, kept

    def preview(self, pixel_values: torch.Tensor, options: PruneOptions) -> tuple[Kept, Spectrum]:
        """The decision about one image that enters no engine, and what it rests on; counted nowhere.

        Arguments and errors are those of ``prune``.
        """
        with self._lock, self.encoder.threads():
            tokens, _ = self._encode(pixel_values)
            return prune(tokens, options), Spectrum.of(tokens)

    def _encode(self, pixel_values: torch.Tensor) -> tuple[VisualTokens, dict[str, float]]:
        """The tokens of one image, and the time it took if they were not at hand."""
        pixels = pixel_values.contiguous().view(torch.uint8).numpy().data
        digest = hashlib.blake2b(pixels, digest_size=16).digest()
        tokens = self._memo.get(digest)
        if tokens is not None:
            return tokens, {}
        start = time.perf_counter()
        tokens = self._memo[digest] = self.encoder.encode(pixel_values)
        return tokens, {"encode": time.perf_counter() - start}

    def admit(self, reports: Iterable[ImageReport]) -> None:
        """Count the images of a request that enters the engine."""
        self.metrics.count_images(self.model_name, reports, self.kv_bytes_per_token)

    def reject(self, reason: str) -> None:
        """Count a request that is refused."""
        self.metrics.count_rejected(self.model_name, reason)
