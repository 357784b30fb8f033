"""Counters of the step loop. Plain integers, owned by the loop's thread; readers take a copy.

EngineCore.counters() adds those that the scheduler and the prefix cache keep: num_preemptions,
num_evicted_pages, num_prefix_queried_tokens, num_prefix_hit_tokens.
"""

from dataclasses import dataclass


@dataclass
class CoreMetrics:
    """Monotonic counts since start.

    The four times are disjoint parts of the steps' wall time: what is not in their sum passed
    between steps or in the recovery from a failed one. Device programs run while the host goes on:
    device_ns is how long it waited for them, not how long they took.
    """

    num_steps: int = 0
    num_failed_steps: int = 0
    num_tokens: int = 0  # computed, prompts included
    num_output_tokens: int = 0
    schedule_ns: int = 0  # who runs, in which pages
    build_ns: int = 0  # rows and batches, and their dispatch
    device_ns: int = 0  # waiting for what the device computed
    emit_ns: int = 0  # making outputs of it
