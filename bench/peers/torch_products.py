"""torch's matmuls of a llama's layers, one after the other.

usage: torch_products.py MODEL ROWS RUNS
"""

import json
import sys
import time
from pathlib import Path

import torch

if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1], "config.json").read_text(encoding="utf-8"))
    rows, runs = int(sys.argv[2]), int(sys.argv[3])
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    qkv, attended = (heads + 2 * kv_heads) * head_dim, heads * head_dim
    shapes = ((hidden, qkv), (attended, hidden), (hidden, 2 * inner), (inner, hidden))
    xs = {width: torch.randn(rows, width).bfloat16() for width, _ in shapes}
    weights = [
        torch.randn(out, width).bfloat16()
        for _ in range(config["num_hidden_layers"])
        for width, out in shapes
    ]
    seconds = []
    with torch.inference_mode():
        for _ in range(runs + 1):  # the first warms up
            started = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(xs[weight.shape[1]], weight)
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(seconds[1:])}))
