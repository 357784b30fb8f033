"""Writes a model folder as Hugging Face would: safetensors, config.json, generation_config.json."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from .model import ModelShape, Weights

ASSETS = Path(__file__).parent.parent / "engine" / "assets" / "demo"


def save_model(
    weights: Weights, shape: ModelShape, folder: Path, *, bos_id: int, eos_id: int
) -> None:
    """Weights are rounded to bfloat16; the tokenizer's files are the tokenizer's business."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(jnp.asarray(w, jnp.bfloat16)) for name, w in weights.items()}
    # save_file would make a file that only its owner can read, and it is packaged as it lies.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    special = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": bos_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_size,
        "max_position_embeddings": shape.max_tokens,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.epsilon,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    } | special
    _write_json(folder / "config.json", dict(sorted(config.items())))
    # Cool by default: at 1, so small a model makes slips.
    sampling = {"do_sample": True, "temperature": 0.3}
    _write_json(folder / "generation_config.json", special | sampling)


def load_shape(folder: Path) -> ModelShape:
    """The shape that save_model wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        mlp_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        max_tokens=config["max_position_embeddings"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        epsilon=config["rms_norm_eps"],
    )


def load_weights(folder: Path) -> Weights:
    """The exported weights in float32, for comparison."""
    file = load_file(folder / "model.safetensors")
    return {name: jnp.asarray(tensor, jnp.float32) for name, tensor in file.items()}


def _write_json(file: Path, value: dict[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
