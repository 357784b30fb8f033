"""Tiny models that eight devices can share, and what they are asked: for tests of tensor
parallelism and for the processes that those start.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from quire import SamplingParams
from quire.layers.models.registry import read_model
from quire.layers.param import param_leaves
from safetensors.numpy import save_file

NUM_TOKENS = 10
NUM_LOGPROBS = 5  # of the engines on several devices of the second model; the others give all

_COMMON = {
    "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# One with as many key and value heads as devices, biases everywhere, and a vocabulary that is no
# multiple of anything; one with fewer heads, two KV groups, and a head that is the embedding.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {
        "model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8,
        "intermediate_size": 96, "vocab_size": 515, "tie_word_embeddings": False,
        "attention_bias": True, "mlp_bias": True,
    },
    "qwen2": _COMMON | {
        "model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
    },
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 2.0, "top_k": 150, "top_p": 0.98},  # past the 64 highest
    {"temperature": 1.5},
    {"temperature": 0.8, "min_p": 0.02, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0.9, "logit_bias": {7: 4.0, 400: 3.0, 511: 4.0}},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(5, 512, 3))},
    {"temperature": 0.5, "repetition_penalty": 1.2},
]


def write_model(folder: Path, name: str) -> None:
    """A model with weights large enough for answers that are not close calls."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    rng = np.random.default_rng(3)
    tensors = {}
    for param in param_leaves(read_model(folder).model.params()):
        for piece in param.slices:
            shape = (piece.rows, *param.shape[1:])
            scale = 1 / shape[-1] ** 0.5 if len(shape) == 2 else 0.3
            if "embed" in piece.tensor or "lm_head" in piece.tensor:
                scale = 0.3
            values = rng.normal(1.0 if param.fill == 1 else 0.0, scale, shape)
            tensors[piece.tensor] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")


def cases(*, num_logprobs: int | None) -> list[tuple[list[int], SamplingParams]]:
    """Prompts around the borders of pages and chunks, each kind of sampling with each of some."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 512, n).tolist() for n in (1, 16, 17, 40)]
    return [
        (
            prompt,
            SamplingParams(
                **kind, seed=10 * i + k, max_tokens=NUM_TOKENS, ignore_eos=True,
                logprobs=num_logprobs, prompt_logprobs=num_logprobs if k == 0 else None,
            ),
        )
        for i, prompt in enumerate(prompts)
        for k, kind in enumerate(KINDS)
    ]  # fmt: skip
