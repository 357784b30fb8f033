"""quire beside vLLM and llama.cpp: the same checkpoint, the same workloads, in alternating runs.

python -m quire.bench.peers [--size 135m] [--engines quire,vllm,llamacpp:bf16] [--rounds 3]
    [--chart FILE.svg]

bench/peers/setup.sh installs the others first. Every round runs each engine once, as a process of
its own; figures are medians over the rounds. Prints one JSON line for each figure and a bar chart,
and how near quire is to the machine's ceilings: weights read once a token, matmuls of a prompt.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import chart
from .report import PEERS_ROOT, emit, line
from .roofline import Ceilings, ceilings

HERE = Path(__file__).parent / "peers"
BAR_COLUMNS = 40
PROMPT_ROWS = 512  # of the workload that makes one token

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


def model_folder(size: str) -> Path:
    return PEERS_ROOT / "models" / size


def command_of(engine: str, size: str) -> list[str]:
    """engine: quire, vllm, hf, or llamacpp:FORMAT."""
    kind, _, weights = engine.partition(":")
    model = model_folder(size)
    match kind:
        case "quire":
            return [sys.executable, str(HERE / "bench_quire.py"), str(model)]
        case "vllm" | "hf":
            return [str(PEERS_ROOT / "vllm/bin/python"), str(HERE / f"bench_{kind}.py"), str(model)]
        case "llamacpp":
            file = f"{model}-{weights or 'bf16'}.gguf"
            return [str(PEERS_ROOT / "llamacpp/bin/python"), str(HERE / "bench_llamacpp.py"), file]
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


def emit_shares(size: str, rates: dict[Workload, list[float]], measured: list[Ceilings]) -> None:
    """quire's shares of reading memory (one request's answer) and of the best matmul (a prompt):
    in each round of what the machine gave in it. rates, measured: one for each round.

    A prompt counts as the products of all its tokens with all layers, though in the last one quire
    makes those of sampled tokens alone: what is compared is the time of an answer.
    """
    model = model_folder(size)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    weight_bytes = (model / "model.safetensors").stat().st_size  # of bfloat16
    embedding = config["vocab_size"] * config["hidden_size"]
    is_tied = config["tie_word_embeddings"]
    read = weight_bytes - (0 if is_tied else 2 * embedding)
    multiplied = weight_bytes // 2 - embedding * (1 if is_tied else 2)
    for (batch, prompt, generated), by_round in rates.items():
        if batch != 1:
            continue
        is_prompt = generated == 1
        most = [each.flops if is_prompt else each.bandwidth for each in measured]
        used = 2 * multiplied if is_prompt else read
        shares = [used * rate / ceiling for rate, ceiling in zip(by_round, most, strict=True)]
        _, title = titles(size, (batch, prompt, generated))
        emit(
            line(
                f"of_{'matmuls' if is_prompt else 'reading'} {title}",
                statistics.median(shares), "x", 0.75, is_least=True,
                rounds=[round(share, 4) for share in shares],
                ceilings=[f"{ceiling / 1e9:.1f} G/s" for ceiling in most],
            )
        )  # fmt: skip
        products = [each.torch_products for each in measured if each.torch_products is not None]
        if is_prompt and len(products) == len(by_round):
            # Below 1: by how much torch would be ahead if all else of a prompt took it no time.
            shares = [each * rate / prompt for each, rate in zip(products, by_round, strict=True)]
            emit(line(f"of_torch_products {title}", statistics.median(shares), "x", None))


def emit_medians(
    size: str, rates: dict[Workload, dict[str, list[float]]], names: dict[str, str]
) -> dict[Workload, dict[str, float]]:
    """The figures and quire's shares of the others'; the medians."""
    found = {}
    for workload, by_engine in rates.items():
        medians = {engine: statistics.median(values) for engine, values in by_engine.items()}
        found[workload] = medians
        what, title = titles(size, workload)
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
            target = TARGETS[size].get(engine, {}).get(workload)
            share = medians["quire"] / value
            emit(line(f"of_{engine} {title}", share, "x", target, is_least=True))
        draw(f"{title}: {what} tokens/s", medians)
    return found


def titles(size: str, workload: Workload) -> tuple[str, str]:
    batch, prompt, generated = workload
    what = "prompt" if generated == 1 else "output"
    return what, f"{size} batch {batch}, {prompt} in, {generated} out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("135m", "1b"), default="135m")
    parser.add_argument("--engines", default="quire,vllm,llamacpp:bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    engines = args.engines.split(",")
    require_installed(engines, args.size)
    rates: dict[Workload, dict[str, list[float]]] = {}
    names: dict[str, str] = {}
    measured_ceilings: list[Ceilings] = []
    for round_number in range(args.rounds):
        for engine in engines:
            print(f"round {round_number + 1} of {args.rounds}: {engine}", file=sys.stderr)
            if engine == "quire":
                measured_ceilings.append(ceilings(model_folder(args.size), PROMPT_ROWS))
                print(measured_ceilings[-1], file=sys.stderr)
            for measured in run_once(engine, args.size):
                keys = ("batch", "prompt_tokens", "generated_tokens")
                batch, prompt, generated = (measured[key] for key in keys)
                by_engine = rates.setdefault((batch, prompt, generated), {})
                by_engine.setdefault(engine, []).append(rate(measured))
                print(json.dumps(measured), file=sys.stderr)  # a run that is cut off leaves these
                names[engine] = measured["engine"]
    medians = emit_medians(args.size, rates, names)
    if "quire" in engines:
        by_round = {workload: by_engine["quire"] for workload, by_engine in rates.items()}
        emit_shares(args.size, by_round, measured_ceilings)
    if args.chart:
        bars = {}
        for workload, by_engine in medians.items():
            what, title = titles(args.size, workload)
            bars[f"{title} ({what} tokens/s)"] = by_engine
        chart.write(args.chart, "quire beside others on a CPU", bars)


if __name__ == "__main__":
    main()
