"""After warm-up nothing is traced, lowered or compiled, whatever the requests ask for."""

import random

import jax
import jax.numpy as jnp
import pytest
from quire import SamplingParams
from quire.engine.compiler import num_compile_events

from .engines import start


def random_params(rng: random.Random) -> SamplingParams:
    options: dict[str, object] = {"max_tokens": rng.randint(1, 9), "ignore_eos": rng.random() < 0.5}
    choices: dict[str, list[object]] = {
        "temperature": [0.0, 0.3, 1.0, 1.7],
        "top_p": [1.0, 0.9, 0.2],
        "top_k": [0, 1, 40, 300],
        "min_p": [0.0, 0.1],
        "presence_penalty": [0.0, 0.5],
        "frequency_penalty": [0.0, -0.5],
        "repetition_penalty": [1.0, 1.3],
        "seed": [None, 3, -5, 2**62],
        "logprobs": [None, 0, 3, -1],
        "prompt_logprobs": [None, None, None, 0, 2],
        "logit_bias": [None, {3: 5.0, 400: -100.0}],
        "allowed_token_ids": [None, None, [5, 6, 7, 500]],
        "stop_token_ids": [None, [11, 12]],
        "bad_words": [None, None, ["the", "license copy"]],
        "stop": [None, ["e"]],
    }
    for name, values in choices.items():
        if rng.random() < 0.4:
            options[name] = rng.choice(values)
    if rng.random() < 0.2:
        options["min_tokens"] = rng.randint(0, int(str(options["max_tokens"])))
    params = {k: v for k, v in options.items() if v is not None}
    if params.get("temperature") != 0.0 and rng.random() < 0.1:
        params["n"] = 2
    return SamplingParams(**params)


@pytest.mark.parametrize("num_requests", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_soak_of_mixed_requests_compiles_nothing(num_requests: int) -> None:
    rng = random.Random(1)
    prompts = [
        [rng.randrange(3, 512) for _ in range(rng.choice((1, 2, 7, 16, 33, 90, 140)))]
        for _ in range(num_requests)
    ]
    params = [random_params(rng) for _ in prompts]
    with start("llama32_tied", kv_cache_memory_bytes=4 << 20, max_model_len=256) as llm:
        before = num_compile_events()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert num_compile_events() == before
        assert len(outputs) == num_requests
        assert all(a.finish_reason for o in outputs for a in o.outputs)
        llm._engine.core.scheduler.audit()
        # The counter does see one eager operation.
        jax.block_until_ready(jnp.ones((3, 5, num_requests)) * 2)
        assert num_compile_events() > before
