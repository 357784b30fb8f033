"""Mistral (Jiang et al. 2023): Llama with a sliding attention window."""

from .config_reader import ConfigReader
from .llama import DecoderSpec, read_common


def read_config(reader: ConfigReader) -> DecoderSpec:
    heads = reader.take_positive("num_attention_heads")
    head_dim = reader.take_positive("head_dim", reader.take_positive("hidden_size") // heads)
    # null switches the window off; where the key is absent transformers assumes 4096.
    window = reader.take_window("sliding_window", absent=4096)
    # Some files of this family say that there are none.
    reader.require("attention_bias", (False,), False)
    reader.require("mlp_bias", (False,), False)
    return DecoderSpec(
        **read_common(reader, heads, head_dim, kv_heads_if_absent=8),
        windows=(window,) * reader.take_positive("num_hidden_layers"),
    )
