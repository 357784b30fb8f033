"""torch's best matmul. usage: torch_matmul.py DTYPE SHAPES_AS_JSON RUNS"""

import json
import sys
import time

import torch

if __name__ == "__main__":
    dtype, shapes, runs = getattr(torch, sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    best = (0.0, None)
    for rows, width, out in shapes:
        a, b = torch.ones(rows, width, dtype=dtype), torch.ones(out, width, dtype=dtype)
        with torch.inference_mode():
            torch.nn.functional.linear(a, b)
            for _ in range(runs):
                started = time.perf_counter()
                torch.nn.functional.linear(a, b)
                seconds = time.perf_counter() - started
                best = max(best, (2 * rows * width * out / seconds, [rows, width, out]))
    print(json.dumps({"flops": best[0], "shape": best[1], "version": torch.__version__}))
