"""A whole model with the GPU's product kernel, interpreted, gives the tokens that XLA's products
give.
"""

from dataclasses import replace

import pytest
from quire import SamplingParams
from quire.pallas_kernels import registry

from .engines import start

PROMPTS = [[5, 6, 7], list(range(3, 20))]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
# Each program and each block of the grid is interpreted: as few as will do.
FEW = {
    "dtype": "bfloat16",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "token_buckets": (8,),
    "max_logprobs": 0,
    "lazy_compile": True,
}


def answers(monkeypatch: pytest.MonkeyPatch, name: str) -> list[list[int]]:
    [linear] = [linear for linear in registry.LINEAR if linear.name == name]
    if linear.kernel is not None:
        sizes = replace(linear.kernel.sizes, num_sms=1)
        linear = replace(linear, kernel=replace(linear.kernel, sizes=sizes))
    chosen = replace(linear, only_by_name=False)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "LINEAR", (chosen,))
        with start("llama_linear_rope_bias", **FEW) as llm:
            assert llm._engine.core.runner.lowering.programs.ctx.ops.linear == chosen
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]


def test_the_interpreted_kernel_gives_the_tokens_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up in different orders: no step of these answers is close enough to tell."""
    assert answers(monkeypatch, "mosaic-interpreted") == answers(monkeypatch, "xla")
