"""What the gateway counts, as Prometheus reads it."""

import dataclasses
from itertools import pairwise

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from quire.serving.core_client.client import CoreStatus
from quire.serving.gateway.histogram import LATENCY_S, NUM_TOKENS, TOKEN_S, Histogram
from quire.serving.gateway.metrics import GatewayMetrics

STATUS = CoreStatus(
    has_work=True,
    step_age_ns=250_000_000,
    num_running=3,
    num_waiting=5,
    num_pages=200,
    num_free_pages=50,
    counters={
        "num_steps": 10.0,
        "num_failed_steps": 1.0,
        "num_tokens": 100.0,
        "num_output_tokens": 40.0,
        "num_preemptions": 2.0,
        "num_evicted_pages": 6.0,
        "num_prefix_queried_tokens": 64.0,
        "num_prefix_hit_tokens": 32.0,
        "schedule_ns": 1e9,
        "build_ns": 2e9,
        "device_ns": 3e9,
        "emit_ns": 4e9,
    },
    num_compiles=0,
    max_model_len=128,
    vocab_size=100,
)
# name -> type: those of vLLM that dashboards and routers read, and ours.
VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "cache_config_info": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "admission_rejections": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
}
OURS = {
    "serving": "gauge",
    "requests_open": "gauge",
    "requests_queued": "gauge",
    "queued_tokens": "gauge",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "kv_cache_usage_ratio": "gauge",
    "kv_pages": "gauge",
    "kv_pages_free": "gauge",
    "step_age_seconds": "gauge",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "generation_tokens": "counter",
    "requests_resumed": "counter",
    "slow_readers_cancelled": "counter",
    "core_restarts": "counter",
    "requests_finished": "counter",
    "requests_rejected": "counter",
    "compiles_after_warm_up": "counter",
    "core_steps": "counter",
    "core_failed_steps": "counter",
    "core_tokens": "counter",
    "core_output_tokens": "counter",
    "preemptions": "counter",
    "prefix_queried_tokens": "counter",
    "prefix_hit_tokens": "counter",
    "evicted_pages": "counter",
    "step_seconds": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "time_per_output_token_seconds": "histogram",
    "e2e_latency_seconds": "histogram",
    "queue_time_seconds": "histogram",
    "prefill_time_seconds": "histogram",
    "decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
}


def families(metrics: GatewayMetrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.render())}


def value(metrics: GatewayMetrics, name: str, **labels: str) -> float:
    """Of the one sample of this name with these labels."""
    found = [
        sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, name
    return found[0]


@pytest.fixture
def metrics() -> GatewayMetrics:
    made = GatewayMetrics("org/model")
    made.core = STATUS
    return made


def test_an_observation_is_in_the_first_bucket_that_holds_it():
    histogram = Histogram((1.0, 2.0, 5.0))
    for number in (0.5, 1.0, 1.0001, 5.0, 5.1):
        histogram.observe(number)
    assert histogram.cumulative() == [2, 3, 4, 5]
    assert histogram.sum == pytest.approx(12.6001)


@pytest.mark.parametrize(
    ("bounds", "first", "last"),
    [(LATENCY_S, 0.001, 160.0), (TOKEN_S, 0.0001, 160.0), (NUM_TOKENS, 1.0, 1e6)],
)
def test_buckets_are_fine_and_cover_what_happens(
    bounds: tuple[float, ...], first: float, last: float
):
    assert (bounds[0], bounds[-1]) == (first, last)
    finest = 2.5 if bounds is NUM_TOKENS else 1.7
    for low, high in pairwise(bounds):
        assert 1 < high / low <= finest
    assert all(float(str(bound)) == bound and len(str(bound)) <= 9 for bound in bounds)


def test_names_and_types_are_those_that_others_read(metrics: GatewayMetrics):
    expected = {f"vllm:{name}": kind for name, kind in VLLM.items()}
    expected |= {f"quire_{name}": kind for name, kind in OURS.items()}
    assert {name: family.type for name, family in families(metrics).items()} == expected


def test_every_series_says_which_model_it_is_of():
    metrics = GatewayMetrics('a "model"\\of\nours')
    metrics.core = STATUS
    for family in families(metrics).values():
        for sample in family.samples:
            assert sample.labels["model_name"] == 'a "model"\\of\nours'
            is_labelled = family.name.startswith("vllm:") and "admission" not in family.name
            assert sample.labels.get("engine") == ("0" if is_labelled else None)


def test_histograms_are_whole(metrics: GatewayMetrics):
    """Buckets grow with their bounds up to +Inf, which is the count."""
    for seconds in (0.00005, 0.0042, 0.0043, 7.0, 1000.0):
        metrics.inter_token_latency.observe(seconds)
    read = families(metrics)
    assert len([family for family in read.values() if family.type == "histogram"]) == 18
    for family in read.values():
        if family.type != "histogram":
            continue
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in family.samples
            if sample.name == f"{family.name}_bucket"
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1][0] == float("inf")
        assert buckets[-1][1] == value(metrics, f"{family.name}_count")
    for name in ("quire_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"):
        assert value(metrics, f"{name}_count") == 5
        assert value(metrics, f"{name}_sum") == pytest.approx(1007.00855)
        assert value(metrics, f"{name}_bucket", le="0.0001") == 1
        assert value(metrics, f"{name}_bucket", le="0.003") == 1
        assert value(metrics, f"{name}_bucket", le="0.005") == 3
        assert value(metrics, f"{name}_bucket", le="7.0") == 4


@pytest.mark.parametrize(
    ("attribute", "ours", "vllm"),
    [
        ("time_to_first_token", "time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("time_per_output_token", "time_per_output_token_seconds",
         "request_time_per_output_token_seconds"),
        ("e2e_latency", "e2e_latency_seconds", "e2e_request_latency_seconds"),
        ("queue_time", "queue_time_seconds", "request_queue_time_seconds"),
        ("prefill_time", "prefill_time_seconds", "request_prefill_time_seconds"),
        ("decode_time", "decode_time_seconds", "request_decode_time_seconds"),
        ("prompt_tokens_hist", "request_prompt_tokens", "request_prompt_tokens"),
        ("generation_tokens_hist", "request_generation_tokens", "request_generation_tokens"),
    ],
)  # fmt: skip
def test_an_observation_is_in_the_histograms_of_its_name(
    metrics: GatewayMetrics, attribute: str, ours: str, vllm: str
):
    getattr(metrics, attribute).observe(3.0)
    counts = [
        sample.name
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name.endswith("_count") and sample.value == 1
    ]
    assert counts == [f"quire_{ours}_count", f"vllm:{vllm}_count"]


@pytest.mark.parametrize(
    ("attribute", "names"),
    [
        ("num_prompt_tokens", ("quire_prompt_tokens_total", "vllm:prompt_tokens_total")),
        ("num_generation_tokens", ("quire_generation_tokens_total",
                                   "vllm:generation_tokens_total")),
        ("num_cached_tokens", ("quire_prompt_tokens_cached_total",
                               "vllm:prompt_tokens_cached_total")),
        ("num_resumed", ("quire_requests_resumed_total",)),
        ("num_cancelled_slow", ("quire_slow_readers_cancelled_total",)),
        ("core_restarts", ("quire_core_restarts_total",)),
        ("num_open", ("quire_requests_open",)),
        ("num_queued", ("quire_requests_queued",)),
        ("num_queued_tokens", ("quire_queued_tokens",)),
    ],
)  # fmt: skip
def test_numbers_of_the_gateway_are_shown(
    metrics: GatewayMetrics, attribute: str, names: tuple[str, ...]
):
    setattr(metrics, attribute, 17)
    for name in names:
        assert value(metrics, name) == 17


def test_requests_are_counted_by_reason(metrics: GatewayMetrics):
    metrics.finished_by_reason["length"] += 2
    metrics.rejected_by_reason["max_num_queued_reqs"] += 3
    metrics.rejected_by_reason["invalid"] += 4
    for name in ("quire_requests_finished_total", "vllm:request_success_total"):
        assert value(metrics, name, finished_reason="length") == 2
        for reason in ("stop", "abort", "error"):
            assert value(metrics, name, finished_reason=reason) == 0
    for name in ("quire_requests_rejected_total", "vllm:admission_rejections_total"):
        assert value(metrics, name, reason="max_num_queued_reqs") == 3
        assert value(metrics, name, reason="max_num_queued_tokens") == 0
    assert value(metrics, "quire_requests_rejected_total", reason="invalid") == 4
    vllm = families(metrics)["vllm:admission_rejections"]
    assert {sample.labels["reason"] for sample in vllm.samples} == {
        "max_num_queued_reqs",
        "max_num_queued_tokens",
    }


def test_numbers_of_the_core_are_shown(metrics: GatewayMetrics):
    for name, expected in {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 5,
        "vllm:kv_cache_usage_perc": 0.75,
        "vllm:prefix_cache_queries_total": 64,
        "vllm:prefix_cache_hits_total": 32,
        "vllm:num_preemptions_total": 2,
        "quire_kv_pages": 200,
        "quire_kv_pages_free": 50,
        "quire_core_steps_total": 10,
        "quire_core_failed_steps_total": 1,
        "quire_core_tokens_total": 100,
        "quire_core_output_tokens_total": 40,
        "quire_evicted_pages_total": 6,
        "quire_step_age_seconds": 0.25,
        "quire_compiles_after_warm_up_total": 0,
    }.items():
        assert value(metrics, name) == expected
    assert value(metrics, "vllm:cache_config_info", num_gpu_blocks="200") == 1
    phases = {"schedule": 1, "build": 2, "device": 3, "emit": 4}
    for phase, seconds in phases.items():
        assert value(metrics, "quire_step_seconds_total", phase=phase) == seconds


def test_of_a_core_that_is_gone_nothing_is_shown(metrics: GatewayMetrics):
    metrics.is_serving = True
    assert value(metrics, "quire_serving") == 1
    metrics.core, metrics.is_serving = None, False
    assert value(metrics, "quire_serving") == 0
    names = families(metrics).keys()
    assert not names & {"vllm:num_requests_running", "quire_step_seconds", "quire_core_steps"}


def test_what_the_core_does_not_count_is_not_shown(metrics: GatewayMetrics):
    """Without a prefix cache; and a core without pages is no division by zero."""
    metrics.core = dataclasses.replace(STATUS, counters={"num_steps": 1.0}, num_pages=0)
    names = families(metrics).keys()
    assert "quire_core_steps" in names
    assert "vllm:prefix_cache_queries" not in names
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0
