"""Qwen3 (Yang et al. 2025): Qwen2 with a norm on each head of q and k instead of biases."""

from .config_reader import ConfigReader
from .llama import DecoderSpec, read_common
from .qwen2 import read_windows


def read_config(reader: ConfigReader) -> DecoderSpec:
    heads = reader.take_positive("num_attention_heads")
    head_dim = reader.take_positive("head_dim", 128)
    bias = reader.take("attention_bias", bool, False)
    return DecoderSpec(
        **read_common(reader, heads, head_dim, kv_heads_if_absent=32),
        windows=read_windows(reader),
        qkv_bias=bias,
        out_bias=bias,
        head_norm=True,
    )
