"""The tokenizer of quire-demo: byte-level BPE, one token a digit, ChatML turns.

Trains it, writes it in Hugging Face's files, and turns conversations into token ids with a mark on
what the assistant says. Does not know the model.

A word has the same tokens after a space as without one, so that copying it is copying tokens: BPE
is trained on words without their spaces, and a space joins a word's first token only in merges that
come after all others, for the most frequent words.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from .corpus import draw_conversation
from .exchange import Conversation
from .rendering import TURN_END, TURN_START, pieces_of

TEXT_END = "<|endoftext|>"
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END)
TOOL_TOKENS = ("<tool_call>", "</tool_call>")  # added, but text: not left out of answers
VOCAB_SIZE = 1536
_NUM_SPACED_WORDS = 300
_NUM_CONVERSATIONS = 20_000  # to train on
_SPACE = "Ġ"  # as byte-level BPE writes it
_MARKS = r"(?: ?[^\s\p{L}\p{N}]+)+ ?"
_WORDS_ALONE, _WORDS_WITH_SPACE = (
    rf"\p{{N}}|{_MARKS}|{word}|\s" for word in (r"\p{L}+", r" ?\p{L}+")
)
_TEMPLATE_FILE = Path(__file__).parent / "chat_template.jinja"


@dataclass(frozen=True)
class EncodedConversation:
    token_ids: list[int]
    is_answer: list[bool]  # what the assistant says, its turn's end included


def train_tokenizer(seed: int) -> tokenizers.Tokenizer:
    """Digits stand alone: a sum is then learnt by place, not by heart."""
    spaceless = tokenizers.Tokenizer(models.BPE())
    spaceless.pre_tokenizer = _splitting(_WORDS_ALONE)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - _NUM_SPACED_WORDS - len(TOOL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spaceless.train_from_iterator(texts_to_learn_from(seed), trainer)
    model = json.loads(spaceless.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    for word in _frequent_words(texts_to_learn_from(seed), vocab):
        vocab[_SPACE + word] = len(vocab)
        merges.append((_SPACE, word))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _splitting(_WORDS_WITH_SPACE)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    return tokenizer


def _splitting(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def texts_to_learn_from(seed: int) -> Iterator[str]:
    rng = Random(f"tokenizer {seed}")
    for _ in range(_NUM_CONVERSATIONS):
        for text, _is_answer in pieces_of(draw_conversation(rng)):
            yield text


def _frequent_words(texts: Iterator[str], vocab: dict[str, int]) -> list[str]:
    """Those after a space that are one token. Small letters only: names are what is copied."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word in re.findall(" ([a-z]+)", text) if word in vocab)
    return [word for word, _ in counts.most_common(_NUM_SPACED_WORDS)]


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


def encode_conversations(
    tokenizer: tokenizers.Tokenizer, conversations: list[Conversation]
) -> list[EncodedConversation]:
    pieces = [pieces_of(conversation) for conversation in conversations]
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
