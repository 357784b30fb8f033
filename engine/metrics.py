"""Counters of the step loop. Plain integers, owned by the loop's thread; readers take a copy."""

from dataclasses import dataclass


@dataclass
class CoreMetrics:
    """Monotonic counts since start."""

    num_steps: int = 0
    num_failed_steps: int = 0
    num_tokens: int = 0  # computed, prompts included
    num_output_tokens: int = 0
