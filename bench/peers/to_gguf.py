"""A llama checkpoint as GGUF: bf16 written here, quantized files by llama.cpp itself.

usage: to_gguf.py MODEL_DIR OUT_PREFIX
"""

import json
import sys

import gguf
import llama_cpp
import ml_dtypes  # noqa: F401 (numpy learns bfloat16)
import numpy as np
from safetensors import safe_open

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
QUANTIZED = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}
UNUSED_TOKEN, NORMAL_TOKEN, CONTROL_TOKEN = 5, 1, 3


def write_facts(writer, config):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_file_type(32)


def write_tokenizer(writer, folder, vocab_size):
    with open(folder + "/tokenizer.json") as stream:
        tokenizer = json.load(stream)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED_TOKEN] * vocab_size
    for text, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL_TOKEN
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL_TOKEN
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    with open(folder + "/chat_template.jinja") as stream:
        writer.add_chat_template(stream.read())


def write_weights(writer, folder, heads, kv_heads):
    with safe_open(folder + "/model.safetensors", "np") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            x = file.get_tensor(key).astype(np.float32)
            parts = key.split(".")
            name = TOP_NAMES.get(key)
            if name is None:
                name = f"blk.{parts[2]}.{LAYER_NAMES['.'.join(parts[3:-1])]}.weight"
            if "q_proj" in key:
                x = interleaved(x, heads)
            if "k_proj" in key:
                x = interleaved(x, kv_heads)
            if x.ndim == 1:
                writer.add_tensor(name, x)
            else:
                kind = gguf.GGMLQuantizationType.BF16
                packed = gguf.quants.quantize(np.ascontiguousarray(x), kind)
                writer.add_tensor(name, packed, raw_dtype=kind)


def interleaved(x, num_heads):
    """llama.cpp rotates neighbours where checkpoints rotate halves."""
    halves = x.reshape(num_heads, 2, x.shape[0] // num_heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def main():
    folder, out = sys.argv[1], sys.argv[2]
    with open(folder + "/config.json") as stream:
        config = json.load(stream)
    writer = gguf.GGUFWriter(out + "-bf16.gguf", "llama")
    write_facts(writer, config)
    write_tokenizer(writer, folder, config["vocab_size"])
    write_weights(writer, folder, config["num_attention_heads"], config["num_key_value_heads"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, kind in QUANTIZED.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = kind
        source, target = f"{out}-bf16.gguf".encode(), f"{out}-{name}.gguf".encode()
        if llama_cpp.llama_model_quantize(source, target, params):
            raise SystemExit(f"quantizing to {name} failed")


if __name__ == "__main__":
    main()
