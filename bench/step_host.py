"""Host time of one step of the loop with 256 running requests: thread time, so that waiting for the
device does not count, on the embedded model.

python -m quire.bench.step_host
"""

import statistics
import time

from quire.engine.config import EngineConfig
from quire.engine.core import Submission
from quire.engine.sampling_params import SamplingParams
from quire.engine.startup import start_engine

from .report import emit, line

NUM_REQUESTS, NUM_STEPS, TARGET_MS = 256, 100, 4


def main() -> None:
    config = EngineConfig(
        max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=1024, token_buckets=(64, 256, 1024)
    )
    core = start_engine(config, lambda _: None).core
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS + 60, ignore_eos=True)
    for i in range(NUM_REQUESTS):
        core.submit(Submission(str(i), (5 + i % 7,) * 30, params, seed=i))
    while len(core.scheduler.running) < NUM_REQUESTS or core.scheduler.running[-1].num_output < 5:
        core.step()
    times_ms = []
    for _ in range(NUM_STEPS):
        before = time.thread_time()
        outputs = core.step()
        times_ms.append((time.thread_time() - before) * 1000)
        assert len(outputs) == NUM_REQUESTS, (
            "a request ended early: the figure would be of another load"
        )
    emit(
        line(
            "step_host_time_256",
            statistics.median(times_ms),
            "ms",
            TARGET_MS,
            p95=round(statistics.quantiles(times_ms, n=20)[-1], 3),
            steps=NUM_STEPS,
        )
    )


if __name__ == "__main__":
    main()
