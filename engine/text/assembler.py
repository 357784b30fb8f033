"""From a request's tokens to its text: incremental decoding and stop strings, one object per
choice.

Used by LLM and the gateway; the core only ever sees token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..sampling_params import SamplingParams
from .detokenizer import IncrementalDetokenizer
from .stop_strings import StopStrings
from .tokenizer import Tokenizer


class TextAssembler:
    """Push tokens, take text. `matched` is the stop string that ended the text, if one did; after
    that nothing more is to be pushed.
    """

    __slots__ = ("_detokenizer", "_keeps_stop", "_min_tokens", "_num_tokens", "_stops", "matched")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
            if params.detokenize
            else None
        )
        self._stops = (
            StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        )
        self._min_tokens = params.min_tokens
        self._keeps_stop = params.include_stop_str_in_output
        self._num_tokens = 0
        self.matched: str | None = None

    def push(self, token_id: int, *, is_last: bool, is_stop_token: bool) -> str:
        """The text that one more token makes final.

        A stop token (end of sequence or stop_token_ids) has no text unless stops are to be
        included; with the last token everything held back comes out.
        """
        self._num_tokens += 1
        if self._detokenizer is None:
            return ""
        text = ""
        if not is_stop_token or self._keeps_stop:
            text = self._detokenizer.step(token_id)
        if is_last:
            text += self._detokenizer.finish()
        return text if self._stops is None else self._through_stops(self._stops, text, is_last)

    def flush(self) -> str:
        """What was held back, for a request that ends without a token (abort, error)."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.finish()
        return text if self._stops is None else self._through_stops(self._stops, text, True)

    def _through_stops(self, stops: StopStrings, text: str, is_last: bool) -> str:
        result = stops.push(text, may_match=self._num_tokens > self._min_tokens)
        self.matched = result.matched
        if result.matched is not None or not is_last:
            return result.text
        return result.text + stops.flush()
