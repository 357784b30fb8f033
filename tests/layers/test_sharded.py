"""Weights and sampling on several devices: in_shards, and every oracle of test_sampling and
test_draw again over a vocabulary that they share, in a process of its own with that many.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("num_shards", [2, 4])
def test_weights_and_sampling_on_several_devices(num_shards: int) -> None:
    flags = f"--xla_force_host_platform_device_count={num_shards}"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:xdist",
            str(HERE / "test_sampling.py"), str(HERE / "test_draw.py"), str(HERE / "in_shards.py"),
        ],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=HERE.parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
