"""`quire bench latency`: one batch, from submitting it to its last token, again and again."""

import argparse
import statistics
import time
from typing import Any

from ...engine.llm import LLM
from .figures import (
    percentiles,
    random_prompts,
    require_room,
    require_whole,
    whole_length_params,
    write_json,
)


def run(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Measure and print; the exit code."""
    latencies = []
    with LLM(**options) as llm:
        require_room(llm, arguments.input_len, arguments.output_len)
        prompts = random_prompts(llm, arguments.batch_size, arguments.input_len)
        params = whole_length_params(
            arguments.output_len, arguments.n, detokenize=not arguments.disable_detokenize
        )
        for i in range(arguments.num_iters_warmup + arguments.num_iters):
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            require_whole(outputs, arguments.output_len)
            if i >= arguments.num_iters_warmup:
                latencies.append(seconds)
    mean, spread = statistics.fmean(latencies), statistics.pstdev(latencies)
    shares = percentiles(latencies)
    print(f"Avg latency: {mean:.4f} seconds")
    print(f"Std latency: {spread:.4f} seconds")
    for percentage, seconds in shares.items():
        print(f"{percentage}% percentile latency: {seconds:.4f} seconds")
    write_json(
        arguments.output_json,
        {
            "avg_latency": mean,
            "std_latency": spread,
            "latencies": latencies,
            "percentiles": shares,
        },
    )
    return 0
