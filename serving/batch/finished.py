"""Which lines of the input are finished, and whose each id is.

A line is known by its index and its id together: both must agree with what an earlier run wrote.
Holds 63 bits of an id's digest and its index for each line; docs/batch.md says what that costs.
"""

import hashlib
import json
from dataclasses import dataclass

from ...engine.errors import ConfigError
from .line_request import LineId
from .result_line import Origin


@dataclass(frozen=True)
class Claim:
    """origin: its id is unique. first_line: the earlier line that gave the wanted id, if one
    did.
    """

    wanted: LineId
    origin: Origin
    is_finished: bool
    first_line: int | None = None


class Finished:
    """Of one output; results are added as they are found there, lines claimed in input order.

    An id is made up for a line that gave none (`line-3`), or gave one that is taken already
    (`a#line-3`). It depends on the lines before only, so that another run makes up the same one.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._index_by_digest: dict[int, int] = {}  # by the ids that results have, or will have
        self._finished: set[int] = set()  # indexes of the results that are there
        self._num_met = 0  # of those, by the lines claimed so far
        self._errors_without_id: set[int] = set()  # finished with an error under a made-up id
        # The exceptions that tell given ids from made-up ones. First, lines that gave what would
        # have been made up for them; then, given ids that could not be kept, and the first giver.
        self._gave_made_up: set[int] = set()
        self._index_by_lost_digest: dict[int, int] = {}
        self.is_in_order = True
        self.last_index = -1

    @property
    def num_unmet(self) -> int:
        """Results whose line the input did not have so far."""
        return len(self._finished) - self._num_met

    def add(self, line_id: LineId, index: int, *, is_error: bool) -> bool:
        """Note a result of an earlier run; False when its id or index was there already."""
        digest = _digest(line_id)
        if digest in self._index_by_digest or index in self._finished:
            return False
        self._index_by_digest[digest] = index
        self._finished.add(index)
        if is_error and _looks_made_up(line_id, index):
            self._errors_without_id.add(index)
        self.is_in_order &= index > self.last_index
        self.last_index = max(self.last_index, index)
        return True

    def claim(self, line_id: LineId | None, line: int) -> Claim:
        """The next line of the input. Raises ConfigError when the results belong to another
        input.
        """
        wanted: LineId = f"line-{line}" if line_id is None else line_id
        first = None if line_id is None else self._first_giver(line_id, line - 1)
        origin = Origin(wanted, line)
        while (owner := self._index_by_digest.get(_digest(origin.id))) not in (None, origin.index):
            assert owner is not None
            if owner > origin.index:
                raise self._another_input(origin)
            origin = Origin(f"{origin.id}#line-{line}", line)
        is_finished = origin.index in self._finished
        if owner is None:
            if is_finished:
                raise self._another_input(origin)
            self._index_by_digest[_digest(origin.id)] = origin.index
        if line_id is not None and first is None:
            if origin.id != line_id:
                self._index_by_lost_digest.setdefault(_digest(line_id), origin.index)
            elif _looks_made_up(line_id, origin.index):
                self._gave_made_up.add(origin.index)
        self._num_met += is_finished
        return Claim(wanted, origin, is_finished, None if first is None else first + 1)

    def rewind(self) -> None:
        """The same lines will be claimed again, from the first, to the same effect."""
        self._num_met = 0

    def _first_giver(self, line_id: LineId, index: int) -> int | None:
        """The index of an earlier line that gave this id itself."""
        digest = _digest(line_id)
        owner = self._index_by_digest.get(digest, index)
        if owner < index and (owner in self._gave_made_up or not _looks_made_up(line_id, owner)):
            return owner
        first = self._index_by_lost_digest.get(digest, index)
        return first if first < index else None

    def _another_input(self, origin: Origin) -> ConfigError:
        if origin.index in self._errors_without_id:
            return ConfigError(
                f"line {origin.line} of the input has an error in {self._output}, and another id "
                "since; take that error's line out of the output to have it tried again"
            )
        return ConfigError(
            f"{self._output} does not belong to this input: line {origin.line} has the id "
            f"{origin.id!r:.80}, and {self._output} has it for another line, or another id for "
            "this line; give another --output"
        )


def _looks_made_up(line_id: LineId, index: int) -> bool:
    """Whether this is an id that the line of this index can have been given by us."""
    suffix = f"line-{index + 1}"
    return isinstance(line_id, str) and (line_id == suffix or line_id.endswith(f"#{suffix}"))


def _digest(line_id: LineId) -> int:
    """63 bits; as JSON, 1 and "1" are different ids."""
    digest = hashlib.blake2b(json.dumps(line_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
