"""The tokenizer of quire-demo: byte-level BPE, one token a digit, ChatML turns.

Trains it, writes it in Hugging Face's files, and turns conversations into token ids with a mark on
what the assistant says. Does not know the model.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .corpus import Conversation, draw_conversation

TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END)
VOCAB_SIZE = 1024
_TEMPLATE_FILE = Path(__file__).parent / "chat_template.jinja"


@dataclass(frozen=True)
class EncodedConversation:
    token_ids: list[int]
    is_answer: list[bool]  # what the assistant says, its turn's end included


def train_tokenizer(seed: int, num_conversations: int = 20_000) -> tokenizers.Tokenizer:
    """Digits stand alone: a sum is then learnt by place, not by heart."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(f"tokenizer {seed}")
    texts = (
        f"{message['role']}\n{message['content']}"
        for _ in range(num_conversations)
        for message in draw_conversation(rng).messages()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_tokens: int) -> None:
    """max_tokens: the model's context."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TEXT_END,
        "eos_token": TURN_END,
        "pad_token": TEXT_END,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(_TEMPLATE_FILE, folder / _TEMPLATE_FILE.name)


def turn_text(role: str, content: str) -> str:
    """What chat_template.jinja writes for one message; compare.py checks that it is so."""
    return f"{TURN_START}{role}\n{content.strip()}{TURN_END}\n"


def encode_conversations(
    tokenizer: tokenizers.Tokenizer, conversations: list[Conversation]
) -> list[EncodedConversation]:
    """Pieces are cut after a newline, where no token spans the cut."""
    pieces = [_pieces(conversation) for conversation in conversations]
    texts = [text for conversation in pieces for text, _ in conversation]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    encoded = []
    for conversation in pieces:
        token_ids: list[int] = []
        is_answer: list[bool] = []
        for _, answers in conversation:
            ids = next(encodings).ids
            token_ids += ids
            is_answer += [answers] * len(ids)
        encoded.append(EncodedConversation(token_ids, is_answer))
    return encoded


def _pieces(conversation: Conversation) -> list[tuple[str, bool]]:
    """Alternately what is given and what the assistant says; joined, the rendered conversation."""
    pieces: list[tuple[str, bool]] = []
    given = ""
    for message in conversation.messages():
        text = turn_text(message["role"], message["content"])
        if message["role"] != "assistant":
            given += text
            continue
        head = f"{TURN_START}assistant\n"
        pieces += [(given + head, False), (text.removeprefix(head).removesuffix("\n"), True)]
        given = "\n"
    return pieces
