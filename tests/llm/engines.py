"""Small engines for the tests of whole answers, and how two answers are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quire import LLM, RequestOutput
from safetensors.numpy import load_file

REFERENCE = Path(__file__).parent.parent / "reference"
FAMILIES = (
    "llama2_mha",
    "llama31_scaled_rope",
    "llama32_tied",
    "llama_linear_rope_bias",
    "yi_yarn",
    "mistral_sliding",
    "qwen2",
    "qwen3",
    "qwen2_mixed_windows",  # two KV groups
)

# Few programs, so that an engine starts in seconds; large enough for every case here.
SMALL = {
    "dtype": "float32",
    "max_num_seqs": 33,
    "max_num_batched_tokens": 64,
    "token_buckets": (8, 64),
    "kv_cache_memory_bytes": 8 << 20,
    "max_logprobs": -1,
}


def start(family: str, **options: Any) -> LLM:
    return LLM(str(REFERENCE / family), **SMALL | options)


def reference(family: str) -> dict[str, np.ndarray]:
    return load_file(REFERENCE / family / "reference.safetensors")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def prompt_logprobs(output: RequestOutput) -> np.ndarray:
    """f32[prompt tokens - 1, vocab] of an answer that asked for all."""
    assert output.prompt_logprobs is not None
    rows = [p for p in output.prompt_logprobs if p is not None]
    return np.array([[p[i].logprob for i in range(len(p))] for p in rows])


@dataclass
class Comparison:
    """Steps of answers compared token by token, up to a step that was too close to call."""

    num_compared: int = 0
    num_steps: int = 0

    @property
    def share(self) -> float:
        return self.num_compared / self.num_steps

    def add(self, expected: Sequence[int], got: Sequence[int], margins: Sequence[float]) -> None:
        """margins: how far each expected step was from another token. A step that differs must have
        had a margin below 1e-3; it ends the comparison of this answer."""
        assert len(expected) == len(got) == len(margins)
        self.num_steps += len(expected)
        for step, (a, b, margin) in enumerate(zip(expected, got, margins, strict=True)):
            if a != b:
                assert margin < 1e-3, f"step {step}: {a} became {b} at a margin of {margin}"
                return
            self.num_compared += 1
