"""Compares what was trained with what quire serves: token ids, and log-probabilities in float32.

`python -m quire.demo.compare` fails if the chat template or the tokenizer gives other tokens than
the trainer used, or if a log-probability differs by more than TOLERANCE.
"""

import argparse
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from quire import LLM, SamplingParams

from .corpus import draw_conversation
from .exchange import Conversation
from .export import ASSETS, load_shape, load_weights
from .model import ModelShape, Weights, forward
from .tokenizer import encode_conversations

TOLERANCE = 1e-3  # f32 sums of 448 products in another order differ by about 1e-5 a layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--conversations", type=int, default=4)
    args = parser.parse_args()
    weights, shape = load_weights(args.model), load_shape(args.model)
    rng = Random("compare")
    worst = 0.0
    with LLM(str(args.model), dtype="float32", max_logprobs=-1, lazy_compile=True) as llm:
        for _ in range(args.conversations):
            conversation = draw_conversation(rng)
            token_ids = trained_token_ids(args.model, conversation)
            if token_ids != served_token_ids(llm, conversation):
                raise SystemExit(f"the chat template gives other tokens for {conversation}")
            trained = trained_logprobs(weights, token_ids, shape)
            served = served_logprobs(llm, token_ids)
            worst = max(worst, float(np.max(np.abs(trained[:-1] - served))))
            print(f"{len(token_ids)} tokens, largest difference so far {worst:.2e}")
    if not worst <= TOLERANCE:
        raise SystemExit(f"log-probabilities differ by {worst:.2e}, more than {TOLERANCE}")


def trained_token_ids(folder: Path, conversation: Conversation) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    [encoded] = encode_conversations(tokenizer, [conversation])
    return encoded.token_ids


def served_token_ids(llm: LLM, conversation: Conversation) -> list[int]:
    """Without the newline after the last turn, which the trainer does not need."""
    text = llm.get_tokenizer().apply_chat_template(
        conversation.messages(), tools=conversation.tools, add_generation_prompt=False
    )
    return llm.tokenize(text, add_special_tokens=False)[:-1]


def trained_logprobs(weights: Weights, token_ids: list[int], shape: ModelShape) -> np.ndarray:
    """f32[tokens, vocab] of the token after each."""
    ids = jnp.asarray(token_ids, jnp.int32)[None]
    logits = forward(weights, ids, jnp.ones_like(ids), shape)
    return np.asarray(jax.nn.log_softmax(logits[0], axis=-1))


def served_logprobs(llm: LLM, token_ids: list[int]) -> np.ndarray:
    """f32[tokens - 1, vocab]: quire gives those of every prompt token but the first."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    [output] = llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
    rows = []
    for position in (output.prompt_logprobs or [])[1:]:
        assert position is not None
        rows.append([position[token_id].logprob for token_id in range(len(position))])
    return np.asarray(rows, np.float32)


if __name__ == "__main__":
    main()
