"""llama.cpp on the workloads, one unified KV cache. usage: bench_llamacpp.py MODEL.gguf"""

import ctypes
import os
import sys

import llama_cpp as lib
import numpy as np
from workload import measure

MOST_TOKENS = 2048  # of one call of decode


@lib.llama_log_callback
def be_quiet(level, text, user):
    pass


lib.llama_backend_init()
lib.llama_log_set(be_quiet, ctypes.c_void_p(0))
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = 16384, MOST_TOKENS, 512
params.n_seq_max, params.kv_unified = 64, True
params.n_threads = params.n_threads_batch = os.cpu_count()
context = lib.llama_init_from_model(model, params)
vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
batch = lib.llama_batch_init(MOST_TOKENS, 0, 1)


def decode(items):
    """items: (token, position, sequence, whether its logits are wanted)."""
    batch.n_tokens = len(items)
    for i, (token, position, sequence, wants_logits) in enumerate(items):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
        batch.seq_id[i][0], batch.n_seq_id[i] = sequence, 1
    if lib.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")


def pick(i):
    logits = lib.llama_get_logits_ith(context, i)
    return int(np.argmax(np.ctypeslib.as_array(logits, (vocab_size,))))


def run(prompts, n):
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    items = [
        (token, at, sequence, at == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for at, token in enumerate(prompt)
    ]
    last = {}
    for first in range(0, len(items), MOST_TOKENS):
        chunk = items[first : first + MOST_TOKENS]
        decode(chunk)
        for i, (_, _, sequence, wants_logits) in enumerate(chunk):
            if wants_logits:
                last[sequence] = pick(i)
    length = len(prompts[0])
    for made in range(1, n):
        decode([(last[s], length + made - 1, s, True) for s in range(len(prompts))])
        last = {s: pick(s) for s in range(len(prompts))}
    return n * len(prompts)


name = f"llama.cpp (llama-cpp-python {lib.__version__})"
measure(name, os.path.basename(sys.argv[1]), run, np.random.default_rng(0))
