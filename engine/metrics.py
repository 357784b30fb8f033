"""Counters of the step loop. Plain integers, owned by the loop's thread; readers take a copy.

EngineCore.counters() adds those that the scheduler and the prefix cache keep: num_preemptions,
num_evicted_pages, num_prefix_queried_tokens, num_prefix_hit_tokens.
"""

from dataclasses import dataclass


@dataclass
class CoreMetrics:
    """Monotonic counts since start."""

    num_steps: int = 0
    num_failed_steps: int = 0
    num_tokens: int = 0  # computed, prompts included
    num_output_tokens: int = 0
