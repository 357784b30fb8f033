"""quire beside vLLM and llama.cpp: the same checkpoint, the same workloads, in alternating runs.

python -m quire.bench.peers [--size 135m] [--engines quire,vllm,llamacpp:bf16] [--rounds 3]

bench/peers/setup.sh installs the others first. Every round runs each engine once, as a process of
its own; figures are medians over the rounds. Prints one JSON line for each figure and a bar chart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .report import emit, line

HERE = Path(__file__).parent / "peers"
ROOT = Path(os.environ.get("QUIRE_PEERS", Path.home() / ".cache" / "quire-peers"))
BAR_COLUMNS = 40

Workload = tuple[int, int, int]
# (batch, prompt tokens, generated tokens) -> by how much quire is to be ahead, of a size's engines
TARGETS: dict[str, dict[str, dict[Workload, float]]] = {
    "135m": {
        "vllm": {
            (1, 32, 64): 1.5, (8, 32, 64): 1.2, (32, 32, 64): 1.1, (32, 128, 128): 1.2,
            (1, 512, 1): 1.0,
        },
        "llamacpp:bf16": {(1, 32, 64): 1.2},
    },
    "1b": {
        engine: {
            (1, 32, 64): 1.1, (8, 32, 64): 1.0, (32, 32, 64): 1.0, (32, 128, 128): 1.0,
            (1, 512, 1): 1.0,
        }
        for engine in ("vllm", "llamacpp:bf16")
    },
}  # fmt: skip


def command_of(engine: str, size: str) -> list[str]:
    """engine: quire, vllm, hf, or llamacpp:FORMAT."""
    kind, _, weights = engine.partition(":")
    model = ROOT / "models" / size
    match kind:
        case "quire":
            return [sys.executable, str(HERE / "bench_quire.py"), str(model)]
        case "vllm" | "hf":
            return [str(ROOT / "vllm/bin/python"), str(HERE / f"bench_{kind}.py"), str(model)]
        case "llamacpp":
            file = f"{model}-{weights or 'bf16'}.gguf"
            return [str(ROOT / "llamacpp/bin/python"), str(HERE / "bench_llamacpp.py"), file]
    raise SystemExit(f"unknown engine {engine!r}; there are quire, vllm, hf, llamacpp:FORMAT")


def require_installed(engines: list[str], size: str) -> None:
    """Before any of them runs for minutes."""
    for engine in engines:
        program, _, model = command_of(engine, size)
        if not (Path(program).exists() and Path(model).exists()):
            raise SystemExit(f"{engine} is not installed; run bench/peers/setup.sh {size}")


def run_once(engine: str, size: str) -> list[dict[str, Any]]:
    """The lines that one process printed."""
    command = command_of(engine, size)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]


def rate(measured: dict[str, Any]) -> float:
    """Tokens per second: of the prompt where one token is made, else generated ones."""
    chosen: float = measured["prompt_tok_s"] or measured["out_tok_s"]
    return chosen


def draw(title: str, rates: dict[str, float]) -> None:
    """One chart for people, on stderr: stdout is for JSON lines."""
    print(f"\n{title}", file=sys.stderr)
    longest = max(rates.values())
    for engine, value in rates.items():
        bar = "█" * max(1, round(value / longest * BAR_COLUMNS))
        print(f"  {engine:<16} {bar} {value:.0f}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("135m", "1b"), default="135m")
    parser.add_argument("--engines", default="quire,vllm,llamacpp:bf16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engines = args.engines.split(",")
    require_installed(engines, args.size)
    rates: dict[Workload, dict[str, list[float]]] = {}
    names: dict[str, str] = {}
    for round_number in range(args.rounds):
        for engine in engines:
            print(f"round {round_number + 1} of {args.rounds}: {engine}", file=sys.stderr)
            for measured in run_once(engine, args.size):
                keys = ("batch", "prompt_tokens", "generated_tokens")
                batch, prompt, generated = (measured[key] for key in keys)
                by_engine = rates.setdefault((batch, prompt, generated), {})
                by_engine.setdefault(engine, []).append(rate(measured))
                names[engine] = measured["engine"]
    for workload, by_engine in rates.items():
        batch, prompt, generated = workload
        medians = {engine: statistics.median(values) for engine, values in by_engine.items()}
        what = "prompt" if generated == 1 else "output"
        title = f"{args.size} batch {batch}, {prompt} in, {generated} out"
        for engine, values in by_engine.items():
            emit(
                line(
                    f"{what}_tokens_per_s {title}", medians[engine], "tokens/s", None,
                    engine=names[engine], weights=engine, rounds=values,
                )
            )  # fmt: skip
        for engine, value in medians.items():
            if engine == "quire" or "quire" not in medians:
                continue
            target = TARGETS[args.size].get(engine, {}).get(workload)
            share = medians["quire"] / value
            emit(line(f"of_{engine} {title}", share, "x", target, is_least=True))
        draw(f"{title}: {what} tokens/s", medians)


if __name__ == "__main__":
    main()
