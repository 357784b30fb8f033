"""Which lines of the input are finished, and whose each id is.

A line is known by its index and its id together: both must agree with what an earlier run wrote.
Holds 64 bits of an id's digest and its index, about 150 bytes a line in all.
"""

import hashlib
import json
from dataclasses import dataclass

from ...engine.errors import ConfigError
from .line_request import LineId
from .result_line import Origin


@dataclass(frozen=True)
class Claim:
    """origin: its id is unique. first_line: the line that has the wanted id already, if one
    has.
    """

    wanted: LineId
    origin: Origin
    is_finished: bool
    first_line: int | None = None


class Finished:
    """Of one output; results are added as they are found there, lines claimed in input order."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._index_by_digest: dict[int, int] = {}
        self._unmet: set[int] = set()  # finished indexes whose line was not read yet
        self.is_in_order = True
        self.last_index = -1

    @property
    def num_unmet(self) -> int:
        """Results whose line the input did not have so far."""
        return len(self._unmet)

    def add(self, line_id: LineId, index: int) -> bool:
        """Note a result of an earlier run; False when its id or index was there already."""
        digest = _digest(line_id)
        if digest in self._index_by_digest or index in self._unmet:
            return False
        self._index_by_digest[digest] = index
        self._unmet.add(index)
        self.is_in_order &= index > self.last_index
        self.last_index = max(self.last_index, index)
        return True

    def claim(self, line_id: LineId | None, line: int) -> Claim:
        """The next line of the input. An id that an earlier line has is made unique by the line's
        number. Raises ConfigError when the results belong to another input.
        """
        wanted: LineId = f"line-{line}" if line_id is None else line_id
        origin, first_line = Origin(wanted, line), None
        while (owner := self._index_by_digest.get(_digest(origin.id))) not in (None, origin.index):
            assert owner is not None
            if owner > origin.index:
                raise self._another_input(origin)
            first_line = first_line or owner + 1
            origin = Origin(f"{origin.id}#line-{line}", line)
        if owner is None:
            if origin.index in self._unmet:
                raise self._another_input(origin)
            self._index_by_digest[_digest(origin.id)] = origin.index
        self._unmet.discard(origin.index)
        return Claim(wanted, origin, owner is not None, first_line)

    def _another_input(self, origin: Origin) -> ConfigError:
        return ConfigError(
            f"{self._output} does not belong to this input: line {origin.line} has the id "
            f"{origin.id!r:.80}, and {self._output} has it for another line, or another id for "
            "this line; give another --output"
        )


def _digest(line_id: LineId) -> int:
    """63 bits; as JSON, 1 and "1" are different ids."""
    digest = hashlib.blake2b(json.dumps(line_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
