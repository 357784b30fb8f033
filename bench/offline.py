"""Offline throughput of a shape with random weights: greedy, random prompts, no early end.

python -m quire.bench.offline [SHAPE]: output tokens per second over the whole wall time.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from quire import LLM, SamplingParams
from quire.engine.model_source import DEMO_FOLDER

from .report import emit, line

RUNS = 3
# (batch, prompt tokens, generated tokens)
WORKLOADS = ((1, 32, 64), (8, 32, 64), (32, 32, 64), (32, 128, 128), (1, 512, 1))


def main() -> None:
    shape = sys.argv[1] if len(sys.argv) > 1 else "135m"
    folder = Path(__file__).parent / "shapes" / shape
    rng = np.random.default_rng(0)
    options = {"tokenizer": str(DEMO_FOLDER), "load_format": "dummy", "max_model_len": 2048}
    with LLM(str(folder), **options, enable_prefix_caching=False, max_num_seqs=32) as llm:
        for batch, prompt, generated in WORKLOADS:
            params = SamplingParams(
                temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False
            )
            seconds = []
            for run in range(RUNS + 1):
                prompts = [rng.integers(3, 900, prompt).tolist() for _ in range(batch)]
                started = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                if run:  # the first is the warm-up
                    seconds.append(time.perf_counter() - started)
                assert all(len(o.outputs[0].token_ids) == generated for o in outputs)
            tokens = prompt if generated == 1 else batch * generated
            what = "prompt" if generated == 1 else "output"
            emit(
                line(
                    f"{what}_tokens_per_s_{shape}_batch{batch}_{prompt}_{generated}",
                    tokens / statistics.median(seconds),
                    "tokens/s",
                    None,
                    runs=RUNS,
                )
            )


if __name__ == "__main__":
    main()
