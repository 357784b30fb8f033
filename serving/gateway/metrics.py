"""What the gateway counts, and all of it in the Prometheus text format.

Counting is plain integers and histograms, owned by the gateway's one thread: it happens for every
token. Names, labels and families are made when somebody asks. Our own names are `quire_…`; the
dashboards and routers of vLLM's users find theirs, `vllm:…`, made from the same numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..core_client.client import CoreStatus
from .histogram import LATENCY_S, NUM_TOKENS, TOKEN_S, Histogram

FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = (
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "invalid",
    "unauthenticated",
    "unavailable",
)


class GatewayMetrics:
    """Counts since the gateway started, and how things stand. All but render() is written to by
    the gateway, directly.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        # Seconds of one request, but for inter_token_latency: of one token.
        self.time_to_first_token = Histogram(LATENCY_S)
        self.inter_token_latency = Histogram(TOKEN_S)
        self.time_per_output_token = Histogram(TOKEN_S)
        self.e2e_latency = Histogram(LATENCY_S)
        self.queue_time = Histogram(TOKEN_S)
        self.prefill_time = Histogram(LATENCY_S)
        self.decode_time = Histogram(LATENCY_S)
        # Tokens of one request.
        self.prompt_tokens_hist = Histogram(NUM_TOKENS)
        self.generation_tokens_hist = Histogram(NUM_TOKENS)

        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_cached_tokens = 0
        self.num_resumed = 0
        self.num_cancelled_slow = 0
        # Every reason from the start: a rate needs the zero before the first one.
        self.finished_by_reason = dict.fromkeys(FINISH_REASONS, 0)
        self.rejected_by_reason = dict.fromkeys(REJECTIONS, 0)

        self.num_open = 0
        self.num_queued = 0
        self.num_queued_tokens = 0
        self.core_restarts = 0
        self.is_serving = False
        self.core: CoreStatus | None = None  # None while it is gone: old numbers are not shown

    def render(self) -> str:
        """Everything, in the Prometheus text format 0.0.4."""
        return generate_latest(_Families(self, self._model_name)).decode()


class _Families(Collector):
    """The metric families of one scrape."""

    def __init__(self, metrics: GatewayMetrics, model_name: str) -> None:
        self._metrics = metrics
        self._own = {"model_name": model_name}
        self._vllm = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        yield from self._histograms()
        yield from self._counters()
        yield from self._gauges()
        if self._metrics.core is not None:
            yield from self._of_core(self._metrics.core)

    def _histograms(self) -> Iterator[Metric]:
        for own, vllm, text, read in _HISTOGRAMS:
            histogram = read(self._metrics)
            yield _histogram(f"quire_{own}", text, self._own, histogram)
            yield _histogram(f"vllm:{vllm}", text, self._vllm, histogram)

    def _counters(self) -> Iterator[Metric]:
        m = self._metrics
        for own, vllm, text, read in _COUNTERS:
            yield _counter(f"quire_{own}", text, self._own, read(m))
            if vllm is not None:
                yield _counter(f"vllm:{vllm}", text, self._vllm, read(m))
        finished, rejected = m.finished_by_reason, m.rejected_by_reason
        text = "requests that ended, by finish reason"
        yield _by_label("quire_requests_finished", text, self._own, "finished_reason", finished)
        yield _by_label("vllm:request_success", text, self._vllm, "finished_reason", finished)
        text = "requests that were refused, by reason"
        yield _by_label("quire_requests_rejected", text, self._own, "reason", rejected)
        full = {k: n for k, n in rejected.items() if k.startswith("max_num_queued_")}
        yield _by_label("vllm:admission_rejections", text, self._own, "reason", full)

    def _gauges(self) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            yield _gauge(f"quire_{name}", text, self._own, read(self._metrics))

    def _of_core(self, core: CoreStatus) -> Iterator[Metric]:
        for name, vllm, text, read in _CORE_GAUGES:
            yield _gauge(f"quire_{name}", text, self._own, read(core))
            if vllm is not None:
                yield _gauge(f"vllm:{vllm}", text, self._vllm, read(core))
        text = "what the KV cache was configured with"
        labels = self._vllm | {"num_gpu_blocks": str(core.num_pages)}
        yield _gauge("vllm:cache_config_info", text, labels, 1)

        compiles = "traces and compiles since warm-up; more than 0 is a bug"
        yield _counter("quire_compiles_after_warm_up", compiles, self._own, core.num_compiles)
        for counted, own, vllm, text in _CORE_COUNTERS:
            if counted in core.counters:  # the prefix cache may be off
                value = core.counters[counted]
                yield _counter(f"quire_{own}", text, self._own, value)
                if vllm is not None:
                    yield _counter(f"vllm:{vllm}", text, self._vllm, value)
        seconds_by_phase = {
            phase: core.counters[f"{phase}_ns"] / 1e9
            for phase in _STEP_PHASES
            if f"{phase}_ns" in core.counters
        }
        text = "time of the steps, by what the host did: device is waiting for the device"
        yield _by_label("quire_step_seconds", text, self._own, "phase", seconds_by_phase)


# Name after `quire_`, after `vllm:`, what it is, where it is.
_HISTOGRAMS: tuple[tuple[str, str, str, Callable[[GatewayMetrics], Histogram]], ...] = (
    (
        "time_to_first_token_seconds",
        "time_to_first_token_seconds",
        "from a request's arrival to its first token",
        lambda m: m.time_to_first_token,
    ),
    (
        "inter_token_latency_seconds",
        "inter_token_latency_seconds",
        "between two tokens of a request",
        lambda m: m.inter_token_latency,
    ),
    (
        "time_per_output_token_seconds",
        "request_time_per_output_token_seconds",
        "mean time of a request's tokens after the first",
        lambda m: m.time_per_output_token,
    ),
    (
        "e2e_latency_seconds",
        "e2e_request_latency_seconds",
        "from a request's arrival to its end",
        lambda m: m.e2e_latency,
    ),
    (
        "queue_time_seconds",
        "request_queue_time_seconds",
        "that a request waited to be admitted to a step",
        lambda m: m.queue_time,
    ),
    (
        "prefill_time_seconds",
        "request_prefill_time_seconds",
        "from a request's admission to its first token",
        lambda m: m.prefill_time,
    ),
    (
        "decode_time_seconds",
        "request_decode_time_seconds",
        "from a request's first token to its last",
        lambda m: m.decode_time,
    ),
    (
        "request_prompt_tokens",
        "request_prompt_tokens",
        "prompt tokens of a request",
        lambda m: m.prompt_tokens_hist,
    ),
    (
        "request_generation_tokens",
        "request_generation_tokens",
        "output tokens of a request",
        lambda m: m.generation_tokens_hist,
    ),
)

_COUNTERS: tuple[tuple[str, str | None, str, Callable[[GatewayMetrics], int]], ...] = (
    ("prompt_tokens", "prompt_tokens", "prompt tokens", lambda m: m.num_prompt_tokens),
    ("generation_tokens", "generation_tokens", "output tokens", lambda m: m.num_generation_tokens),
    (
        "prompt_tokens_cached",
        "prompt_tokens_cached",
        "prompt tokens that the prefix cache had",
        lambda m: m.num_cached_tokens,
    ),
    ("requests_resumed", None, "requests that went on in another core", lambda m: m.num_resumed),
    (
        "slow_readers_cancelled",
        None,
        "requests that ended because their output was not read",
        lambda m: m.num_cancelled_slow,
    ),
    ("core_restarts", None, "times that the core was started again", lambda m: m.core_restarts),
)

_GAUGES: tuple[tuple[str, str, Callable[[GatewayMetrics], float]], ...] = (
    ("serving", "1 while requests are accepted and a core is ready", lambda m: m.is_serving),
    ("requests_open", "requests that the gateway has accepted and not ended", lambda m: m.num_open),
    ("requests_queued", "of these, without a first token", lambda m: m.num_queued),
    ("queued_tokens", "prompt tokens of these", lambda m: m.num_queued_tokens),
)

_CORE_GAUGES: tuple[tuple[str, str | None, str, Callable[[CoreStatus], float]], ...] = (
    (
        "requests_running",
        "num_requests_running",
        "requests that the steps serve",
        lambda c: c.num_running,
    ),
    (
        "requests_waiting",
        "num_requests_waiting",
        "requests that wait in the core for a row or for pages",
        lambda c: c.num_waiting,
    ),
    (
        "kv_cache_usage_ratio",
        "kv_cache_usage_perc",
        "share of the KV pages that are held, 0 to 1",
        lambda c: 1 - c.num_free_pages / c.num_pages if c.num_pages else 0,
    ),
    ("kv_pages", None, "pages of the KV cache", lambda c: c.num_pages),
    ("kv_pages_free", None, "pages that no request holds", lambda c: c.num_free_pages),
    (
        "step_age_seconds",
        None,
        "since the last step ended, or work came to an idle loop; 0 without work",
        lambda c: c.step_age_ns / 1e9,
    ),
)

# The counter's name in CoreStatus, ours, vLLM's, what it counts. They start anew with a core:
# Prometheus knows that of counters.
_CORE_COUNTERS: tuple[tuple[str, str, str | None, str], ...] = (
    ("num_steps", "core_steps", None, "steps"),
    ("num_failed_steps", "core_failed_steps", None, "steps that raised; their requests ran again"),
    ("num_tokens", "core_tokens", None, "tokens computed, those of prompts included"),
    ("num_output_tokens", "core_output_tokens", None, "tokens sampled"),
    (
        "num_preemptions",
        "preemptions",
        "num_preemptions",
        "requests that gave up their pages to others and were computed again",
    ),
    (
        "num_prefix_queried_tokens",
        "prefix_queried_tokens",
        "prefix_cache_queries",
        "prompt tokens that were looked up in the prefix cache",
    ),
    (
        "num_prefix_hit_tokens",
        "prefix_hit_tokens",
        "prefix_cache_hits",
        "prompt tokens that were found in the prefix cache",
    ),
    ("num_evicted_pages", "evicted_pages", None, "cached pages that were given to others"),
)

_STEP_PHASES = ("schedule", "build", "device", "emit")

Labels = Mapping[str, str]


def _gauge(name: str, text: str, labels: Labels, value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: Labels, value: float) -> Metric:
    return _by_label(name, text, labels, None, {None: value})


def _by_label(
    name: str,
    text: str,
    labels: Labels,
    label: str | None,
    values: Mapping[str, float] | Mapping[None, float],
) -> Metric:
    """A counter for each value of one more label."""
    names: Iterable[str] = (*labels, label) if label is not None else labels
    family = CounterMetricFamily(name, text, labels=tuple(names))
    for key, value in values.items():
        family.add_metric((*labels.values(), *(() if key is None else (key,))), value)
    return family


def _histogram(name: str, text: str, labels: Labels, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=tuple(labels))
    bounds = (*map(str, histogram.bounds), "+Inf")
    buckets = list(zip(bounds, histogram.cumulative(), strict=True))
    family.add_metric(tuple(labels.values()), buckets, histogram.sum)
    return family
