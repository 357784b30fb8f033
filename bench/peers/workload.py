"""The workloads every engine is measured on, and the one line it prints for each."""

import json
import time

# (batch, prompt tokens, generated tokens)
WORKLOADS = [(1, 32, 64), (8, 32, 64), (32, 32, 64), (32, 128, 128), (1, 512, 1)]


def random_prompts(rng, batch, length):
    return [rng.integers(10, 30000, length).tolist() for _ in range(batch)]


def measure(engine, model, run, rng):
    """run(prompts, num_generated) -> number of generated tokens.

    Called twice for each workload; the second call is timed.
    """
    for batch, prompt, generated in WORKLOADS:
        run(random_prompts(rng, batch, prompt), generated)
        prompts = random_prompts(rng, batch, prompt)
        started = time.perf_counter()
        num_tokens = run(prompts, generated)
        seconds = time.perf_counter() - started
        line = {
            "engine": engine,
            "model": model,
            "batch": batch,
            "prompt_tokens": prompt,
            "generated_tokens": generated,
            "wall_s": round(seconds, 4),
            "out_tok_s": round(num_tokens / seconds, 1),
            "prompt_tok_s": round(batch * prompt / seconds, 1) if generated == 1 else None,
        }
        print(json.dumps(line), flush=True)
