"""Which cases training never sees."""

import hashlib


def is_held_out(case: str) -> bool:
    """Whether a case is never trained: one in ten, by its hash, whatever the seed."""
    digest = hashlib.blake2b(case.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def is_held_out_word(word: str) -> bool:
    """In any case of letters: "Zukidi" would give "zukidi" away."""
    return is_held_out(f"word {word.lower()}")
