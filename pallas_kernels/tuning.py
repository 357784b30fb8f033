"""Sizes of the GPU kernels: one JSON file per device, and a rule for what a file cannot know.

A file holds what was tuned on its device; how many tiles of a model's head fit into shared memory
follows from their shapes.
"""

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

# What barriers, statistics and the alignment of each array take at most.
_RESERVED_BYTES = 4096


@dataclass(frozen=True)
class DecodeSizes:
    """Of the kernel of one-query rows.

    keys: of a tile; most_stages: tiles in shared memory, if they fit; tiles_per_unit: of a unit of
    work, as long as a row has no more than most_units of them.
    """

    keys: int
    most_stages: int
    tiles_per_unit: int
    most_units: int


@dataclass(frozen=True)
class PrefillSizes:
    """Of the kernel of work items. keys: of a tile whose stages fit; else half as many."""

    keys: int
    most_stages: int


@dataclass(frozen=True)
class LinearSizes:
    """Of the kernel of products of few tokens.

    columns: of a stage, or 64; least_stages: with fewer a tile is not taken; token_cost: what a row
    of x costs a tile, in rows of W (x comes from the L2 cache, W from memory); pair_x_rows: from so
    many rows of x on, two blocks read them together; overlaps_launch: weights are asked for before
    the kernel in front has ended.
    """

    most_tokens: int
    columns: int
    least_stages: int
    most_stages: int
    token_cost: float
    pair_x_rows: int
    overlaps_launch: bool


@dataclass(frozen=True)
class Sizes:
    """measured: whether a run on the device stands behind the numbers."""

    device: str
    measured: bool
    num_sms: int
    shared_memory_bytes: int  # that one block may use
    decode: DecodeSizes
    prefill: PrefillSizes
    linear: LinearSizes


_PARTS = {"decode": DecodeSizes, "prefill": PrefillSizes, "linear": LinearSizes}


class TuningError(ValueError):
    """A tuning file that cannot be used."""


@cache
def load(name: str) -> Sizes:
    """tuned/<name>.json. Raises TuningError naming the file and what is wrong with it."""
    text = (resources.files(__package__) / "tuned" / f"{name}.json").read_text()
    return parse(json.loads(text), f"tuned/{name}.json")


def parse(values: dict[str, Any], source: str) -> Sizes:
    """Sizes from a file's content. `why` is for its reader."""
    rest = {key: value for key, value in values.items() if key != "why"}
    for key, kind in _PARTS.items():
        rest[key] = _build(kind, rest.get(key, {}), f"{source}: {key}")
    sizes: Sizes = _build(Sizes, rest, source)
    for part in (sizes.decode, sizes.prefill):
        if part.keys % 64:
            raise TuningError(f"{source}: keys must be a multiple of 64, got {part.keys}")
    return sizes


def _build(kind: Any, values: dict[str, Any], source: str) -> Any:
    known = {field.name: field.type for field in fields(kind)}
    if values.keys() != known.keys():
        missing, unknown = known.keys() - values.keys(), values.keys() - known.keys()
        raise TuningError(f"{source}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for name, value in values.items():
        if known[name] is int and (type(value) is not int or value < 1):
            raise TuningError(f"{source}: {name} must be a positive whole number, got {value!r}")
    return kind(**values)


def stages_that_fit(sizes: Sizes, stage_bytes: int, other_bytes: int, most: int) -> int:
    """How many stages shared memory holds beside other_bytes, at most `most`; may be 0."""
    room = sizes.shared_memory_bytes - _RESERVED_BYTES - other_bytes
    return max(min(most, room // stage_bytes), 0)
