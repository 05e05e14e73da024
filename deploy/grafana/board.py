"""What the dashboard shows: one description, from which ``generate.py`` builds it.

In a query, ``SEL`` stands for the label matchers of the variables and ``RATE`` for the interval of rates.
"""

from dataclasses import dataclass, field
from typing import Literal

MATCHERS = 'job=~"$job",model_name=~"$model_name",instance=~"$instance"'


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        promql: the query, with ``SEL`` and ``RATE`` in it.
        legend: name of its series.
    """

    promql: str
    legend: str = ""

    @property
    def expr(self) -> str:
        return self.promql.replace("SEL", MATCHERS).replace("RATE", "$__rate_interval")


@dataclass(frozen=True)
class Panel:
    """One panel; its description ends with the metrics it shows.

    Attributes:
        good: what a good value is.
        unit: Grafana's name of it.
        width: of the 24 columns of a row.
        from_zero: whether the axis begins there.
    """

    title: str
    description: str
    good: str
    queries: tuple[Query, ...]
    kind: Literal["stat", "timeseries", "heatmap"] = "timeseries"
    unit: str = "short"
    width: int = 8
    max: float | None = None
    decimals: int | None = None
    from_zero: bool = True


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = field(default=False)


def rate(metric: str, matchers: str = "SEL", by: str = "") -> str:
    """Events per second over all that is selected."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{matchers}}}[RATE]))"


def quantile(q: float, metric: str, matchers: str = "SEL", by: str = "le") -> str:
    return f"histogram_quantile({q}, {rate(metric + '_bucket', matchers, by)})"


def ratio(part: str, whole: str) -> str:
    """Nothing where there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


REQUESTS = 'SEL,source="request"'  # without previews
ENCODED = rate("eadaprune_visual_tokens_total", 'SEL,stage="encoded"')
TOKENS, ITEMS_PER_SECOND = "count:tok/s", "count:items/s"
KEPT = rate("eadaprune_visual_tokens_total", 'SEL,stage="kept"')
ITEMS = f"({rate('eadaprune_images_total')} + {rate('eadaprune_videos_total')})"

SAVINGS = Row(
    "Savings",
    (
        Panel(
            "Visual tokens saved",
            "Visual tokens per second that pruning kept out of the engine. eadaprune_tokens_saved_total",
            "above zero whenever images arrive",
            (Query(rate("eadaprune_tokens_saved_total")),),
            "stat",
            TOKENS,
            width=6,
        ),
        Panel(
            "Kept",
            "Share of the visual tokens that entered the engine. eadaprune_visual_tokens_total",
            "near the default target; if it is far above, images are denser than the reference pictures",
            (Query(ratio(KEPT, ENCODED)),),
            "stat",
            "percentunit",
            width=6,
        ),
        Panel(
            "Images and videos",
            "Images and videos per second of requests that were sent to the engine, including cached ones. "
            "eadaprune_images_total, eadaprune_videos_total",
            "as the traffic; zero while requests have images means that none reaches the plugin",
            (Query(ITEMS),),
            "stat",
            ITEMS_PER_SECOND,
            width=6,
        ),
        Panel(
            "KV cache saved",
            "KV cache per second that the saved tokens would have taken; an upper bound, as vLLM allocates whole "
            "blocks and shares prefixes. eadaprune_kv_cache_bytes_saved_total",
            "above zero; it grows with traffic",
            (Query(rate("eadaprune_kv_cache_bytes_saved_total")),),
            "stat",
            "Bps",
            width=6,
        ),
        Panel(
            "Visual tokens",
            "Visual tokens per second before and after pruning. eadaprune_visual_tokens_total",
            "the second line well below the first",
            (Query(ENCODED, "before"), Query(KEPT, "after")),
            unit=TOKENS,
        ),
        Panel(
            "Share kept, per image or video",
            "How many images and videos keep which share of their tokens: a dense band at the bottom is what blank "
            "pictures look like. eadaprune_kept_ratio",
            "spread over several bands; a single band means that budgets do not depend on the image",
            (Query("sum by (le) (increase(eadaprune_kept_ratio_bucket{SEL}[RATE]))", "{{le}}"),),
            "heatmap",
            "percentunit",
        ),
        Panel(
            "Effective energy thresholds",
            "Which thresholds images and videos were pruned with. eadaprune_energy_threshold",
            "the default's band, and those that clients set on purpose",
            (Query("sum by (le) (increase(eadaprune_energy_threshold_bucket{SEL}[RATE]))", "{{le}}"),),
            "heatmap",
        ),
    ),
)
COST = Row(
    "Cost",
    (
        Panel(
            "Time of each stage, p95",
            "95th percentile of the time of each stage, per image or video that was not cached. "
            "eadaprune_stage_seconds",
            "spectrum and select together below a twentieth of encode",
            (Query(quantile(0.95, "eadaprune_stage_seconds", f'{REQUESTS},stage!="total"', "le, stage"), "{{stage}}"),),
            unit="s",
        ),
        Panel(
            "Time of all stages",
            "Quantiles of the time that encoding and pruning one image or video take. eadaprune_stage_seconds",
            "near what encoding takes alone; p99 far above p50 means very large pictures",
            tuple(
                Query(quantile(q, "eadaprune_stage_seconds", f'{REQUESTS},stage="total"'), f"p{q * 100:g}")
                for q in (0.5, 0.95, 0.99)
            ),
            unit="s",
        ),
        Panel(
            "Cache hits",
            "Hit rate of vLLM's processor cache and prefix cache; an image in the processor cache is not encoded "
            "again. vllm:mm_cache_hits_total, vllm:prefix_cache_hits_total",
            "as high as the traffic repeats itself; a fall after a roll-out is normal for some minutes",
            (
                Query(ratio(rate("vllm:mm_cache_hits_total"), rate("vllm:mm_cache_queries_total")), "images"),
                Query(ratio(rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total")), "prefixes"),
            ),
            unit="percentunit",
            max=1,
        ),
    ),
)
ENGINE = Row(
    "The engine beside it",
    (
        Panel(
            "KV cache in use",
            "Share of the KV cache in use, of the fullest and of the average engine. vllm:kv_cache_usage_perc",
            "below 90 % in use; above it requests begin to wait or are preempted",
            (
                Query("max(vllm:kv_cache_usage_perc{SEL})", "fullest"),
                Query("avg(vllm:kv_cache_usage_perc{SEL})", "average"),
            ),
            unit="percentunit",
            max=1,
        ),
        Panel(
            "Time to first token",
            "Quantiles of the time to first token; encoding and pruning are part of it. "
            "vllm:time_to_first_token_seconds",
            "within your service level, and not above what stock vLLM had",
            tuple(Query(quantile(q, "vllm:time_to_first_token_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
            unit="s",
        ),
        Panel(
            "Throughput",
            "Tokens per second through the engine; kept visual tokens are among those of prompts. "
            "vllm:prompt_tokens_total, vllm:generation_tokens_total",
            "as high as demand; generated tokens should not fall when prompts rise",
            (
                Query(rate("vllm:prompt_tokens_total"), "prompt"),
                Query(rate("vllm:generation_tokens_total"), "generated"),
            ),
            unit=TOKENS,
        ),
        Panel(
            "Requests",
            "Requests that run and that wait. vllm:num_requests_running, vllm:num_requests_waiting",
            "none waiting for long",
            (
                Query("sum(vllm:num_requests_running{SEL})", "running"),
                Query("sum(vllm:num_requests_waiting{SEL})", "waiting"),
            ),
        ),
        Panel(
            "Preemptions",
            "Requests per second that lost their KV cache to others. vllm:num_preemptions_total",
            "none",
            (Query(rate("vllm:num_preemptions_total"), "preempted"),),
            unit="reqps",
        ),
        Panel(
            "Finished requests",
            "Requests per second, by how they ended. vllm:request_success_total",
            "stop and length; next to no abort or error",
            (Query(rate("vllm:request_success_total", by="finished_reason"), "{{finished_reason}}"),),
            unit="reqps",
        ),
    ),
)
TROUBLE = Row(
    "Rejections and bounds",
    (
        Panel(
            "Rejected requests",
            "Requests per second that were rejected: invalid options, non-finite features, errors in the engine. "
            "eadaprune_rejected_requests_total",
            "none; features and engine are errors of the server, options of a client",
            (Query(rate("eadaprune_rejected_requests_total", REQUESTS, "reason"), "{{reason}}"),),
            unit="reqps",
            width=12,
        ),
        Panel(
            "Budgets at a bound",
            "Share of images and videos whose budget min_tokens, min_share or max_tokens determined instead of the "
            "threshold. eadaprune_bound_total",
            "below a half in all",
            tuple(
                Query(ratio(rate("eadaprune_bound_total", f'SEL,bound="{bound}"'), ITEMS), bound)
                for bound in ("min_tokens", "min_share", "max_tokens")
            ),
            unit="percentunit",
            max=1,
            width=12,
        ),
    ),
)
DEFAULTS = Row(
    "Defaults",
    (
        Panel(
            "Target and floor",
            "Mean share of their tokens that images keep by default, 0 where a threshold was named, and the floor. "
            "All replicas of a model should have the same. eadaprune_default_target, eadaprune_default_min_share",
            "what you chose, one value for all replicas",
            (
                Query("max(eadaprune_default_target{SEL})", "target"),
                Query("max(eadaprune_default_min_share{SEL})", "floor"),
            ),
            "stat",
            "percentunit",
            width=6,
        ),
        Panel(
            "Threshold",
            "Default energy threshold. eadaprune_default_energy_threshold",
            "one value for all replicas of a model",
            (Query("max(eadaprune_default_energy_threshold{SEL})"),),
            "stat",
            decimals=4,
            width=4,
        ),
        Panel(
            "Reference pictures",
            "What each kind of reference picture keeps of its tokens: they should differ. "
            "eadaprune_reference_kept_ratio",
            "far apart, surfaces lowest",
            (Query("avg by (kind) (eadaprune_reference_kept_ratio{SEL})", "{{kind}}"),),
            "stat",
            "percentunit",
            width=10,
        ),
        Panel(
            "Pictures at a bound",
            "Share of the reference pictures whose budget a bound determines: above a half, default budgets hardly "
            "depend on the image. eadaprune_reference_at_bound_ratio",
            "below a half",
            (Query("max(eadaprune_reference_at_bound_ratio{SEL})"),),
            "stat",
            "percentunit",
            width=4,
        ),
    ),
)
LOAD = Row(
    "Budgets that follow the load (--eadaprune-load-aware)",
    (
        Panel(
            "Load level",
            "How far load lowers thresholds: 0 not at all, 1 down to the policy's floor. eadaprune_load_level",
            "0 most of the time; long at 1 calls for more replicas",
            (Query("max by (instance) (eadaprune_load_level{SEL})", "{{instance}}"),),
            unit="percentunit",
            max=1,
        ),
        Panel(
            "Energy thresholds, mean",
            "Requested and effective threshold. eadaprune_energy_requested, eadaprune_energy_threshold",
            "both lines equal, except during bursts",
            tuple(
                Query(ratio(rate(f"eadaprune_energy_{which}_sum"), rate(f"eadaprune_energy_{which}_count")), legend)
                for which, legend in (("requested", "requested"), ("threshold", "effective"))
            ),
            decimals=4,
            from_zero=False,
        ),
        Panel(
            "Thresholds lowered",
            "Images and videos per second whose threshold was lowered under load. eadaprune_load_lowered_total",
            "zero, except during bursts",
            (Query(rate("eadaprune_load_lowered_total"), "lowered"),),
            unit=ITEMS_PER_SECOND,
        ),
    ),
    collapsed=True,
)
ROWS = (SAVINGS, COST, ENGINE, TROUBLE, DEFAULTS, LOAD)
