"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v; some checkpoints use
windows.
"""

from .config_reader import ConfigReader
from .llama import DecoderSpec, read_common


def read_config(reader: ConfigReader) -> DecoderSpec:
    heads = reader.take_positive("num_attention_heads")
    head_dim = reader.take_positive("head_dim", reader.take_positive("hidden_size") // heads)
    return DecoderSpec(
        **read_common(reader, heads, head_dim, kv_heads_if_absent=32),
        windows=read_windows(reader),
        qkv_bias=True,
    )


def read_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """The window of each layer: layer_types where given, else layers from max_window_layers on
    slide.
    """
    layers = reader.take_positive("num_hidden_layers")
    is_on = reader.take("use_sliding_window", bool, False)
    window = reader.take_window("sliding_window", absent=4096) if is_on else None
    reader.take("sliding_window", int, None)
    first = reader.take("max_window_layers", int, 28)
    types = reader.take_layer_types(layers)
    if window is None:
        return (None,) * layers
    if types is None:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in types)
