"""Prometheus metrics on vLLM's own ``/metrics``.

Counters and histograms add up over several API servers (multiprocess mode). Names start with ``eadaprune_``, because
vLLM unregisters all that start with ``vllm:``.
"""

import itertools
from typing import Literal, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from eadaprune_vllm.core.options import Bound, PruneOptions
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.core.server_info import Reference

LABEL = "model_name"
Source = Literal["request", "preview"]  # previews (endpoint, commands) are not served traffic
_RATIOS = [i / 20 for i in range(1, 21)]
_THRESHOLDS = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99]
_THRESHOLDS += [0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0]
_SECONDS = [mantissa * 10.0**exponent for exponent in range(-4, 1) for mantissa in (1, 2, 5)] + [10.0]


class Metrics:
    """The metrics of one process.

    Args:
        registry: where to register.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"eadaprune_{name}", text, [LABEL, *labels], registry=registry)

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"eadaprune_{name}", text, [LABEL, *labels], buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            names = [LABEL, *labels]
            return Gauge(f"eadaprune_{name}", text, names, registry=registry, multiprocess_mode="mostrecent")

        self._images = counter("images", "Images of requests that were sent to the engine, including cached ones.")
        self._videos = counter("videos", "Videos of requests that were sent to the engine, including cached ones.")
        self._visual_tokens = counter(
            "visual_tokens",
            "Visual tokens of these images and videos: 'encoded' without pruning, 'kept' with it.",
            "stage",
        )
        self._tokens_saved = counter("tokens_saved", "Visual tokens that pruning kept out of the engine.")
        self._bytes_saved = counter(
            "kv_cache_bytes_saved",
            "KV cache that the saved tokens would have taken, in bytes. An upper bound: vLLM allocates whole blocks, "
            "prefix cache hits take no new ones, and some dtypes pack several numbers into a byte.",
        )
        self._bound = counter(
            "bound",
            "Images and videos whose budget was determined by min_tokens, min_share or max_tokens instead of the "
            "threshold.",
            "bound",
        )
        self._rejected = counter(
            "rejected_requests",
            "Rejected requests: 'options' for invalid pruning options, 'features' for NaN or infinity in an image's "
            "features, 'engine' for other errors in the engine.",
            "reason",
            "source",
        )
        self._kept_ratio = histogram("kept_ratio", "Kept over encoded tokens, per image or video.", _RATIOS)
        self._threshold = histogram("energy_threshold", "Effective energy threshold, per image or video.", _THRESHOLDS)
        self._requested = histogram(
            "energy_requested", "Energy threshold before load lowered it, per image or video.", _THRESHOLDS
        )
        self._lowered = counter("load_lowered", "Images and videos whose energy threshold was lowered under load.")
        self._load_level = gauge(
            "load_level", "How far load lowers energy thresholds: 0 not at all, 1 down to the policy's floor."
        )
        self._target = gauge(
            "default_target", "Default target: mean share of tokens that images keep; 0 if an energy was set instead."
        )
        self._min_share = gauge("default_min_share", "Default minimum share of its tokens that an image keeps.")
        self._default_energy = gauge("default_energy_threshold", "Default energy threshold.")
        self._reference = gauge(
            "reference_kept_ratio",
            "Kept over all tokens of the model's reference pictures, with the defaults.",
            "kind",
        )
        self._at_bound = gauge(
            "reference_at_bound_ratio",
            "Share of the reference pictures whose budget is determined by a bound instead of the default threshold.",
        )
        self._stage = histogram(
            "stage_seconds",
            "Time of each stage of pruning an image or video that was not cached.",
            _SECONDS,
            "stage",
            "source",
        )

    def declare(self, model_name: str) -> None:
        """Start every series of a model at zero, so that rates and alerts see its first event."""
        for metric in (
            self._images,
            self._videos,
            self._tokens_saved,
            self._bytes_saved,
            self._kept_ratio,
            self._threshold,
            self._requested,
            self._lowered,
            self._load_level,
        ):
            metric.labels(model_name)
        for labelled, *values in (
            (self._visual_tokens, ("encoded", "kept")),
            (self._bound, get_args(Bound)),
            (self._rejected, ("options", "features", "engine"), get_args(Source)),
            (self._stage, ("encode", "spectrum", "select", "total"), get_args(Source)),
        ):
            for labels in itertools.product(*values):
                labelled.labels(model_name, *labels)

    def count(self, model_name: str, pruning: Pruning) -> None:
        """Count the images and videos of one prompt when it is sent to the engine."""
        self._images.labels(model_name).inc(len(pruning.of("image")))
        self._videos.labels(model_name).inc(len(pruning.of("video")))
        for item in pruning.of():
            saved = item.visual_tokens - item.kept_tokens
            self._visual_tokens.labels(model_name, "encoded").inc(item.visual_tokens)
            self._visual_tokens.labels(model_name, "kept").inc(item.kept_tokens)
            self._tokens_saved.labels(model_name).inc(saved)
            self._bytes_saved.labels(model_name).inc(saved * pruning.kv_bytes_per_token)
            self._kept_ratio.labels(model_name).observe(item.kept_tokens / item.visual_tokens)
            if item.bound:
                self._bound.labels(model_name, item.bound).inc()
            self._threshold.labels(model_name).observe(item.energy_threshold)
            self._requested.labels(model_name).observe(item.energy_requested)
            self._lowered.labels(model_name).inc(item.energy_threshold < item.energy_requested)

    def set_defaults(self, model_name: str, effective: PruneOptions, reference: Reference) -> None:
        """Set the gauges of the defaults."""
        self._target.labels(model_name).set(effective.target or 0)
        self._min_share.labels(model_name).set(effective.min_share)
        self._default_energy.labels(model_name).set(effective.threshold)
        self._at_bound.labels(model_name).set(reference.at_bound)
        for kind, share in reference.kept_by_kind.items():
            self._reference.labels(model_name, kind).set(share)

    def set_load_level(self, model_name: str, level: float) -> None:
        """Set the gauge of the load."""
        self._load_level.labels(model_name).set(level)

    def observe_stages(self, model_name: str, source: Source, **seconds: float) -> None:
        """Record how long each stage of pruning one image or video took; ``total`` is their sum."""
        for stage, value in (seconds | {"total": sum(seconds.values())}).items():
            self._stage.labels(model_name, stage, source).observe(value)

    def count_rejected(self, model_name: str, reason: str, source: Source) -> None:
        """Count one rejected request."""
        self._rejected.labels(model_name, reason, source).inc()
