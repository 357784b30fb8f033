"""Real tokenizers for these tests, from the wheel of mistral-common; nothing is downloaded.

Needs the packages mistral-common (tokenizer files, and the oracle of ids) and sentencepiece.
"""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mistral_common
import pytest
import tokenizers
from quire.engine.text.tokenizer import Tokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

WHEEL_DATA = Path(mistral_common.__file__).parent / "data"
REFERENCE = Path(__file__).parents[2] / "reference"


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_from_tekken(file: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE with tekken's ids: special tokens first, then the bytes by rank.

    Ranks say which pair to merge first; every split of a token into two tokens is such a pair.
    """
    tekken = json.loads(file.read_text(encoding="utf-8"))
    config = tekken["config"]
    num_special = config["default_num_special_tokens"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"]]
    tokens = tokens[: config["default_vocab_size"] - num_special]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    characters = byte_characters()
    spelled = ["".join(characters[byte] for byte in token) for token in tokens]
    specials = {entry["rank"]: entry["token_str"] for entry in tekken.get("special_tokens") or []}
    names = [specials.get(rank, f"<SPECIAL_{rank}>") for rank in range(num_special)]
    vocab = {name: rank for rank, name in enumerate(names)}
    vocab |= {text: num_special + rank for rank, text in enumerate(spelled)}
    merges = [
        (spelled[left], spelled[right])
        for token in tokens
        for left, right in sorted(
            (ranks[token[:cut]], ranks[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        )
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def tokenizer_from_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """A metaspace BPE with byte fallback, as the first files of Llama and Mistral were.

    The pair whose whole has the highest score is merged first; transformers 5.23 orders pairs by id
    instead, which makes other ids of repeated spaces (their scores are the lowest).
    """
    pieces = SentencePieceProcessor(str(file))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    by_score = sorted(vocab, key=lambda piece: -pieces.get_score(vocab[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in by_score
        if not (pieces.is_control(vocab[piece]) or pieces.is_byte(vocab[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tekken() -> Tokenizer:
    backend = tokenizer_from_tekken(WHEEL_DATA / "tekken_240911.json")
    named = {"bos_token": "<SPECIAL_1>", "eos_token": "<SPECIAL_2>"}
    return Tokenizer(backend, special_tokens=named)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Mistral 7B was first published in part: tokenizer.model, no tokenizer.json."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(WHEEL_DATA / "tokenizer.model.v1", folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    backend = tokenizer_from_sentencepiece(WHEEL_DATA / "tokenizer.model.v1")
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def tokenizer_named(tekken: Tokenizer, sentencepiece: Tokenizer) -> Callable[[str], Tokenizer]:
    """A tokenizer by name: tekken, sentencepiece, or a folder of tests/reference."""
    loaded = {"tekken": tekken, "sentencepiece": sentencepiece}

    def get(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = Tokenizer.from_folder(REFERENCE / name)
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def their_tekken() -> Callable[[str], list[int]]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(WHEEL_DATA / "tekken_240911.json")
    return lambda text: theirs.encode(text, bos=False, eos=False)


@pytest.fixture(scope="session")
def their_sentencepiece() -> Callable[[str], list[int]]:
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    theirs = SentencePieceTokenizer(WHEEL_DATA / "tokenizer.model.v1")
    return lambda text: theirs.encode(text, bos=False, eos=False)
