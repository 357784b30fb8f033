"""Finds stop strings in a stream of text and holds back only what could still become one.

Knows text only: no tokens, no tokenizer. One object per choice of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopResult:
    """text: final, to be emitted now. matched: the stop string that ends the answer, or None."""

    text: str
    matched: str | None = None


class StopStrings:
    """The stop string that is complete first wins; of two that end together, the longer one.

    That rule reads the text character by character, so it does not depend on how the text was
    split, and it never waits for a longer match once one is complete. Cost: O(characters x stops),
    whatever the strings (one Knuth-Morris-Pratt automaton each).
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = tuple(stops)
        self._fallbacks = [_borders(stop) for stop in self._stops]
        self._num_matched = [0] * len(
            self._stops
        )  # characters of each stop that the text ends with
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._include_in_output = include_in_output
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> StopResult:
        """may_match=False (below min_tokens): all text is final, and no stop may begin in it."""
        if self._matched is not None:
            return StopResult("", self._matched)
        if not may_match:
            self._num_matched = [0] * len(self._stops)
            return StopResult(self.flush() + text)
        if not self._held and self._first_characters.isdisjoint(text):
            return StopResult(text)
        whole = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self._held, self._matched = "", stop
                end = position if self._include_in_output else position - len(stop)
                return StopResult(whole[:end], stop)
        num_final = len(whole) - max(self._num_matched)
        self._held = whole[num_final:]
        return StopResult(whole[:num_final])

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Feed one character to every automaton; the longest stop string that it completes."""
        complete: str | None = None
        for index, stop in enumerate(self._stops):
            length, borders = self._num_matched[index], self._fallbacks[index]
            while length and stop[length] != character:
                length = borders[length]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                if complete is None or length > len(complete):
                    complete = stop
                length = borders[length]
            self._num_matched[index] = length
        return complete


def _borders(stop: str) -> list[int]:
    """borders[k]: length of the longest proper prefix of stop[:k] that also ends it (KMP 1977)."""
    borders = [0] * (len(stop) + 1)
    length = 0
    for end in range(1, len(stop)):
        while length and stop[length] != stop[end]:
            length = borders[length]
        if stop[length] == stop[end]:
            length += 1
        borders[end + 1] = length
    return borders
