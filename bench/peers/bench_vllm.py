"""vLLM's CPU build on the workloads. usage: bench_vllm.py MODEL_DIR"""

import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)
import numpy as np
import vllm
from vllm import LLM, SamplingParams
from workload import measure

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )

    def run(prompts, n):
        params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": p} for p in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    name = f"vllm-cpu {vllm.__version__}"
    measure(name, os.path.basename(sys.argv[1]), run, np.random.default_rng(0))
