"""`quire bench throughput`: all requests at once, tokens over the whole wall time."""

import argparse
import time
from typing import Any

from ...engine.llm import LLM
from .figures import (
    random_prompts,
    require_room,
    require_whole,
    whole_length_params,
    write_json,
)


def run(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Measure and print; the exit code."""
    with LLM(**options) as llm:
        require_room(llm, arguments.input_len, arguments.output_len)
        prompts = random_prompts(llm, arguments.num_prompts, arguments.input_len)
        params = whole_length_params(
            arguments.output_len, arguments.n, detokenize=not arguments.disable_detokenize
        )
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - started
    require_whole(outputs, arguments.output_len)
    num_prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
    num_output_tokens = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    total = num_prompt_tokens + num_output_tokens
    print(
        f"Throughput: {len(outputs) / seconds:.2f} requests/s, {total / seconds:.2f} total "
        f"tokens/s, {num_output_tokens / seconds:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_prompt_tokens}")
    print(f"Total num output tokens:  {num_output_tokens}")
    write_json(
        arguments.output_json,
        {
            "elapsed_time": seconds,
            "num_requests": len(outputs),
            "total_num_tokens": total,
            "total_input_tokens": num_prompt_tokens,
            "total_output_tokens": num_output_tokens,
            "requests_per_second": len(outputs) / seconds,
            "tokens_per_second": total / seconds,
            "output_tokens_per_second": num_output_tokens / seconds,
        },
    )
    return 0
