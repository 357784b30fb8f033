"""The server beside LLM.generate, the same 32 streams of 128 in and 128 out of the 135M shape with
random weights, in turn; and how long `quire engine` takes until it serves.

Both engines are there all the time and idle while the other runs. The server's client, gateway and
core share the same cores.

python -m quire.bench.serve [--starts]
"""

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from quire.engine.model_source import DEMO_FOLDER
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc

from .report import emit, line

SHAPE = Path(__file__).parent / "shapes" / "135m"
OPTIONS = {
    "tokenizer": str(DEMO_FOLDER),
    "load_format": "dummy",
    "max_model_len": 2048,
    "enable_prefix_caching": False,
}
NUM_STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, RUNS = 32, 128, 128, 3
LEAST_SHARE, COLD_TARGET_S, WARM_TARGET_S, WARM_RUNS = 0.9, 30, 8, 3
_READY = "serving on "


def prompts(run: int) -> list[list[int]]:
    rng = np.random.default_rng(run)
    return [rng.integers(10, 1500, PROMPT_TOKENS).tolist() for _ in range(NUM_STREAMS)]


@contextmanager
def server(verb: str, *flags: str, cache: str | None = None) -> Iterator[tuple[list[str], float]]:
    """A `quire engine` or `quire serve` that serves: its addresses, and the seconds it took."""
    environment = os.environ | ({"QUIRE_CACHE_DIR": cache} if cache else {})
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "quire.serving.cli", verb, "--grpc-port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    try:
        said = []
        for text in process.stderr:
            said.append(text)
            if _READY in text:
                _, _, addresses = text.strip().partition(_READY)
                named = [one.split()[0] for one in addresses.split(" and ")]
                yield named, time.perf_counter() - started
                return
        raise SystemExit(f"the server did not start: {''.join(said)}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


@contextmanager
def offline_beside() -> Iterator[Callable[[int], float]]:
    """LLM.generate in a process of its own: tokens a second of a run."""
    child = subprocess.Popen(
        [sys.executable, "-m", "quire.bench.serve", "--offline"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout
    with child:
        stdout.readline()

        def rate(run: int) -> float:
            stdin.write(f"{run}\n")
            stdin.flush()
            return float(stdout.readline())

        yield rate
        stdin.close()


def offline() -> None:
    """A child: LLM.generate of run n whenever a line says n."""
    from quire import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    with LLM(str(SHAPE), **OPTIONS) as llm:
        print("ready", flush=True)
        for text in sys.stdin:
            started = time.perf_counter()
            outputs = llm.generate(prompts(int(text)), params, use_tqdm=False)
            seconds = time.perf_counter() - started
            print(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds, flush=True)


async def served(address: str, run: int) -> float:
    """Output tokens a second of the server, from the first request sent to the last answer's end,
    over one Session.
    """
    params = pb.SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    async with grpc.aio.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Session()
        started = time.perf_counter()
        for number, ids in enumerate(prompts(run), 1):
            asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)
            submit = pb.SessionSubmit(id=number, generate=asked)
            await call.write(pb.SessionRequest(submit=submit))
        await call.done_writing()
        num_tokens = 0
        async for message in call:
            num_tokens += sum(len(event.delta.token_ids) for event in message.events)
        seconds = time.perf_counter() - started
    if num_tokens != NUM_STREAMS * OUTPUT_TOKENS:
        raise SystemExit(f"{num_tokens} tokens came, not {NUM_STREAMS * OUTPUT_TOKENS}")
    return num_tokens / seconds


def flags_of_shape() -> list[str]:
    """As OPTIONS has them."""
    flags = [str(SHAPE), "--no-enable-prefix-caching"]
    for name in ("tokenizer", "load_format", "max_model_len"):
        flags += [f"--{name.replace('_', '-')}", str(OPTIONS[name])]
    return flags


def compare(name: str, least_share: float, run_served: Callable[[int], float]) -> None:
    """Of the same work in turn, the server's share of what LLM.generate does."""
    figures: tuple[list[float], list[float]] = ([], [])
    with offline_beside() as run_offline:
        for run in range(RUNS + 1):  # the first of each warms up
            figures[0].append(run_offline(run))
            figures[1].append(run_served(run))
    offline_rate, served_rate = (statistics.median(some[1:]) for some in figures)
    emit(
        line(
            name,
            served_rate / offline_rate,
            "of LLM.generate's tokens/s",
            least_share,
            is_least=True,
            served_tokens_per_s=round(served_rate, 1),
            offline_tokens_per_s=round(offline_rate, 1),
            runs=RUNS,
        )
    )


def compare_grpc() -> None:
    with server("engine", *flags_of_shape()) as ((address,), _):
        compare(
            "serve_share_of_offline_32x128_128_135m",
            LEAST_SHARE,
            lambda run: asyncio.run(served(address, run)),
        )


def starts() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o700)
        with server("engine", cache=cache) as (_, cold_s):
            pass
        warm = []
        for _ in range(WARM_RUNS):
            with server("engine", cache=cache) as (_, seconds):
                warm.append(seconds)
    emit(line("serve_ready_cold", cold_s, "s", COLD_TARGET_S))
    emit(line("serve_ready_warm", statistics.median(warm), "s", WARM_TARGET_S, runs=WARM_RUNS))


def main() -> None:
    if "--offline" in sys.argv:
        offline()
        return
    starts()
    if "--starts" not in sys.argv:
        compare_grpc()


if __name__ == "__main__":
    main()
