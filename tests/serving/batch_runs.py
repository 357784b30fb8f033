"""What the tests of `quire generate --input` share: inputs, a small engine, results by id."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire import LLM
from quire.serving.batch.command import run_batch

# The embedded model with few programs: it starts in seconds.
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "token_buckets": (8, 64),
    "kv_cache_memory_bytes": 4 << 20,
    "max_model_len": 256,
}
FLAGS = [
    "--max-num-seqs=8",
    "--max-num-batched-tokens=64",
    "--token-buckets=8,64",
    f"--kv-cache-memory-bytes={4 << 20}",
    "--max-model-len=256",
]
_MAIN = """
import resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
from quire.serving.cli import main
sys.exit(main())
"""


def run(llm: LLM, source: str, target: Path, **options: Any) -> int:
    """The command's run over an engine that stays."""

    @contextmanager
    def start() -> Iterator[LLM]:
        yield llm

    return run_batch(source, str(target), start, **{"sampling": {}} | options)


def write_lines(path: Path, lines: Iterable[Any]) -> str:
    """Objects as JSON, bytes and texts as they are."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line))
        for line in lines
    ]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in encoded) + b"\n")
    return str(path)


def many(num_lines: int, **fields: Any) -> list[dict[str, Any]]:
    """Requests without seeds, at temperature 1."""
    return [{"id": f"r{i}", "prompt": f"Question {i}: what is {i} + 2?", **fields}
            for i in range(num_lines)]  # fmt: skip


def results_in(path: Path) -> list[dict[str, Any]]:
    """In the order of the file, which must be whole."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def answers(results: Iterable[dict[str, Any]]) -> dict[Any, Any]:
    """What does not depend on when a line ran."""
    listed = [(r["id"], (r["index"], r["outputs"], r["error"])) for r in results]
    assert len(dict(listed)) == len(listed)
    return dict(listed)


def child(*arguments: str, limit_bytes: int = 0, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own. limit_bytes: the largest file that it may write."""
    command = [sys.executable, "-c", _MAIN.format(limit=limit_bytes), "generate", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, **streams)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop_at(process: subprocess.Popen[str], path: Path, lines: int, number: signal.Signals) -> str:
    """Send a signal once the output has so many lines; what the process said on stderr."""
    while num_lines(path) < lines:
        assert process.poll() is None, process.communicate()[1]
        os.sched_yield()
    process.send_signal(number)
    return process.communicate(timeout=60)[1]
