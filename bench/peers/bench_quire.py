"""quire on the peers' workloads. usage: bench_quire.py MODEL_DIR"""

import os
import sys

import numpy as np
import quire
from quire import LLM, SamplingParams
from workload import measure

if __name__ == "__main__":
    options = {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64}
    with LLM(sys.argv[1], **options, enable_prefix_caching=False) as llm:

        def run(prompts, n):
            params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return sum(len(o.outputs[0].token_ids) for o in outputs)

        name = f"quire {quire.__version__}"
        measure(name, os.path.basename(sys.argv[1]), run, np.random.default_rng(0))
