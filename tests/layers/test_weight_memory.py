"""What loading weights takes, in a process of its own: never the file and the arrays together."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from quire.cpu_kernels.library import Library
from quire.pallas_kernels.registry import cpu_library
from safetensors.numpy import save_file

NUM, ROWS, COLUMNS = 24, 4096, 1024  # 192 MiB of bfloat16
CODE = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
import ml_dtypes, numpy as np
from quire.engine.weight_loading import WeightLoading
from quire.layers.checkpoint import Checkpoint
from quire.layers.mesh import make_mesh
from quire.layers.param import linear_param
from quire.layers.quantization.registry import choose_format
from quire.layers.weight_cache import WeightCache
from quire.pallas_kernels.registry import choose

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.split(":")[0] in name) / 1024

dtype = np.dtype(ml_dtypes.bfloat16)
form = choose_format(dtype, choose("cpu", dtype=dtype))
params = {{
    f"w{{i}}": linear_param(f"m.w{{i}}.weight", ({ROWS}, {COLUMNS}), ("mlp", "hidden"))
    for i in range({NUM})
}}
folder = Path(sys.argv[1])
model = SimpleNamespace(params=lambda: params, is_unused=lambda name: False)
files = SimpleNamespace(info=SimpleNamespace(model=model), checkpoint=Checkpoint(folder))
loading = WeightLoading(files, form, make_mesh(1), WeightCache(folder / "kept", 1 << 30))
before = resident({{"VmRSS"}})
loaded = loading.load(0, lambda done: None, print)
tree = loaded.tree
print(loaded.lines[-1].split("B ")[1])
print(resident({{"VmHWM"}}) - before, resident({{"VmRSS"}}) - before)
addresses = {{w.w.unsafe_buffer_pointer() % 64 for w in tree.values()}}
assert addresses == {{0}}, addresses
"""


@pytest.mark.parametrize("level", ["", "off"])
def test_loading_takes_little_more_than_the_weights(tmp_path: Path, level: str):
    if not level and not isinstance(cpu_library(), Library):
        pytest.skip("there are no C++ kernels here")
    tensors = {
        f"m.w{i}.weight": np.full((ROWS, COLUMNS), i, ml_dtypes.bfloat16) for i in range(NUM)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    if level:
        check_load(tmp_path, "read", level)
        return
    check_load(tmp_path, "packed, which the cache is being given")
    check_load(tmp_path, "in packed form from the cache")
    (kept,) = (tmp_path / "kept").iterdir()
    with kept.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"damage")
    check_load(tmp_path, "packed, which the cache is being given")


def check_load(folder: Path, expected: str, level: str = "") -> None:
    weights = NUM * ROWS * COLUMNS * 2 / 2**20
    environment = os.environ | {"QUIRE_CPU_KERNELS": level} if level else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, numbers = done.stdout.splitlines()
    assert outcome == expected
    peak, after = map(float, numbers.split())
    # A few tensors of 8 MiB are on their way at a time.
    assert weights < after < weights + 40, (weights, after)
    assert peak < weights + 60, (weights, peak)
