"""Turns the token ids of one answer into text as they come.

Knows the tokenizer and the end of the prompt; does not know stop strings or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from .tokenizer import Tokenizer

# Enough to know whether a word, and so a leading space, has begun; more only makes the first step
# slow.
_NUM_CONTEXT_IDS = 8
# A character spans at most four byte tokens. Longer without a whole character is not text: let it
# go, because each step decodes all that is held.
_MAX_HELD_IDS = 64
_INCOMPLETE = "\ufffd"


class IncrementalDetokenizer:
    """The whole is what decode(prompt + ids) has after decode(prompt), whatever the split of ids.

    So a first word keeps its leading space when the prompt ended in text (SentencePiece), and a
    character that the prompt left unfinished belongs to the answer. Where ids are not UTF-8 the
    whole is what reading them one by one gives: what was emitted is never taken back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = list(prompt_token_ids[-_NUM_CONTEXT_IDS:])
        self._held_ids: list[int] = []
        self._prompt_text = ""  # the prompt's part of what is held, in case it stays unfinished
        self._cut_unfinished_character()
        self._stream = self._new_stream()
        for token_id in self._held_ids:
            self._stream.step(tokenizer.backend, token_id)

    def append(self, token_ids: Sequence[int]) -> str:
        """The new text that is final; "" while a character is unfinished."""
        return "".join([self.step(token_id) for token_id in token_ids])

    def step(self, token_id: int) -> str:
        """append() of one token."""
        self._held_ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception as error:  # what the Rust library raises has no class of its own
            if "prefix" not in str(error):
                raise
            # Byte tokens that were a character became invalid by what followed: keep what was sent.
            return self._release(self._held_text())
        if text is not None:
            return self._release(text, restart=False)
        if len(self._held_ids) >= _MAX_HELD_IDS:
            return self._release(self._held_text())
        return ""

    def finish(self) -> str:
        """What was held back: the replacement characters of an unfinished character, or nothing."""
        return self._release(self._held_text())

    def _release(self, text: str, *, restart: bool = True) -> str:
        if self._prompt_text:
            text = text.removeprefix(self._prompt_text)
            self._prompt_text = ""
        if text:  # only then is there a text that a leading space would follow
            self._context = self._tokenizer.anchor_ids or self._held_ids[-_NUM_CONTEXT_IDS:]
        self._held_ids = []
        if restart:
            self._stream = self._new_stream()
        return text

    def _held_text(self) -> str:
        if not self._held_ids:
            return ""
        before = self._decode(self._context)
        text = self._decode([*self._context, *self._held_ids])
        return text[len(before) :] if text.startswith(before) else self._decode(self._held_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._context, skip_special_tokens=self._skip_special_tokens)

    def _cut_unfinished_character(self) -> None:
        """Hold the prompt's last ids back if they are part of a character: a stream that begins
        with one would emit the prompt's text again."""
        text = self._decode(self._context)
        if not text.endswith(_INCOMPLETE):
            return
        for num_kept in range(len(self._context) - 1, -1, -1):
            kept = self._decode(self._context[:num_kept])
            if not kept.endswith(_INCOMPLETE):
                self._held_ids = self._context[num_kept:]
                self._context = self._context[:num_kept]
                self._prompt_text = text.removeprefix(kept)
                return
