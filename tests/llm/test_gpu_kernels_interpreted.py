"""Whole models with the GPU's attention kernels in the interpreter: the same tokens as with jnp."""

import pytest
from quire.engine import startup
from quire.engine.sampling_params import SamplingParams
from quire.pallas_kernels import registry
from quire.pallas_kernels.registry import choose

from .engines import start

PROMPTS = [[5, 9, 2, 77, 31], list(range(3, 23)), [8]]
# One program, and few rows: the interpreter takes a second for a layer.
TINY = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "token_buckets": (16,)}


def tokens(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    chosen = []

    def choose_by_name(*args: object, **options: object) -> registry.Ops:
        chosen.append(choose(*args, **options | {"attention": attention, "linear": "xla"}))
        return chosen[-1]

    monkeypatch.setattr(startup.registry, "choose", choose_by_name)
    with start(family, dtype="bfloat16", page_size=16, **TINY) as llm:
        answers = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=3))
    assert chosen[0].attention.name == attention
    return [answer.outputs[0].token_ids for answer in answers]


@pytest.mark.parametrize(
    "family",
    [
        "llama31_scaled_rope",
        pytest.param("qwen2_mixed_windows", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_jnp(family: str, monkeypatch: pytest.MonkeyPatch):
    """bfloat16 weights, a float16 cache; prefill, mixed and decode steps, one KV group and two."""
    expected = tokens(family, "jnp", monkeypatch)
    assert tokens(family, "mosaic-interpreted", monkeypatch) == expected
