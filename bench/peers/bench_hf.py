"""transformers' generate, a static batch. usage: bench_hf.py MODEL_DIR"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from workload import measure

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()

    def run(prompts, n):
        x = torch.tensor(prompts)
        with torch.inference_mode():
            y = model.generate(
                x,
                attention_mask=torch.ones_like(x),
                do_sample=False,
                max_new_tokens=n,
                min_new_tokens=n,
                pad_token_id=1,
            )
        return y.numel() - x.numel()

    name = f"transformers {transformers.__version__}"
    measure(name, os.path.basename(sys.argv[1]), run, np.random.default_rng(0))
