"""Safetensors files: what tensors they hold, memory-mapped, and whether they are a model's.

Two exact lists, missing and unexpected tensors, and a refusal if either has any. Never reads
pickle. What becomes of the tensors is the business of weights.py.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .param import param_leaves

_DTYPE_BY_NAME = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER_BYTES = 100_000_000
_LISTED = 20  # tensors named in a message


class CheckpointError(ValueError):
    """The weight files are missing, damaged, or not those of this model."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype name as in the file, shape, and byte range in the mapped file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of a folder's safetensors files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[Path, mmap.mmap] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._digests: list[str] = []  # of the files
        for path in _weight_files(folder):
            for name, tensor in self._read_header(path):
                if name in self._tensors:
                    other = self._tensors[name].path.name
                    raise CheckpointError(
                        f"tensor {name!r} is in both {other} and {path.name} of {folder}; remove "
                        "the file that does not belong to this model"
                    )
                self._tensors[name] = tensor

    def identity(self) -> list[str]:
        """Digests of the files, the same wherever they are. Their data is not read: a file that was
        written, copied or renamed since has another time of its last change.
        """
        return sorted(self._digests)

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def read(self, name: str) -> np.ndarray:
        """A view of the file's bytes; copy it before keeping it. Raises CheckpointError."""
        stored = self._tensors[name]
        dtype = self.dtype(name)
        data = memoryview(self._maps[stored.path])[stored.start : stored.end]
        return np.frombuffer(data, dtype).reshape(stored.shape)

    def forget(self, name: str) -> None:
        """Let go of the memory that read() brought in; the file stays mapped."""
        stored = self._tensors[name]
        start = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stored.end - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[stored.path].madvise(mmap.MADV_DONTNEED, start, length)

    def dtype(self, name: str) -> np.dtype:
        """Raises CheckpointError unless the tensor is a plain array of floats."""
        stored = self._tensors[name]
        if stored.dtype not in _DTYPE_BY_NAME:
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} has dtype {stored.dtype}, and unquantized weights "
                f"are {', '.join(_DTYPE_BY_NAME)}; use an unquantized checkpoint"
            )
        return _DTYPE_BY_NAME[stored.dtype]

    def _read_header(self, path: Path) -> Iterable[tuple[str, StoredTensor]]:
        total = path.stat().st_size
        again = "the file is truncated or damaged; download it again"
        if total < 8:
            raise CheckpointError(
                f"{path} has {total} bytes, too few for a safetensors header; {again}"
            )
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            status = os.fstat(file.fileno())
        self._maps[path] = mapped
        (length,) = struct.unpack("<Q", mapped[:8])
        if length > min(total - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} says its header has {length} bytes but the file has {total}; {again}"
            )
        # The time of modification alone is not enough: those who pack images and archives set it to
        # one value for all files, and two fine-tuned models have the same header and size.
        times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "
        self._digests.append(hashlib.sha256(times.encode() + mapped[8 : 8 + length]).hexdigest())
        try:
            header = json.loads(mapped[8 : 8 + length], object_pairs_hook=_without_duplicates)
            tensors = {
                name: _parse(path, entry, 8 + length)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} has an unreadable header ({type(error).__name__}: {error}); {again}"
            ) from error
        # The format leaves no holes: each tensor starts where the one before it ends.
        expected = 8 + length
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if tensor.end > total:
                raise CheckpointError(
                    f"{path}: tensor {name!r} ends at byte {tensor.end} but the file has {total}; "
                    f"{again}"
                )
            if tensor.start != expected:
                raise CheckpointError(
                    f"{path}: tensor {name!r} starts at byte {tensor.start} and the one before it "
                    f"ends at {expected}; {again}"
                )
            expected = tensor.end
            size = _DTYPE_BY_NAME[tensor.dtype].itemsize if tensor.dtype in _DTYPE_BY_NAME else None
            num_bytes = tensor.end - tensor.start
            if size is not None and num_bytes != math.prod(tensor.shape) * size:
                raise CheckpointError(
                    f"{path}: tensor {name!r} of shape {list(tensor.shape)} does not fill its "
                    f"{num_bytes} bytes; {again}"
                )
        if expected != total:
            raise CheckpointError(
                f"{path}: the tensors end at byte {expected} but the file has {total}; {again}"
            )
        return tensors.items()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _parse(path: Path, entry: dict[str, Any], offset: int) -> StoredTensor:
    """One header entry; its byte range counts from `offset`. Raises ValueError and the like."""
    dtype, shape = entry["dtype"], entry["shape"]
    start, end = entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(f"an entry has dtype {dtype!r} and shape {shape!r}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)) or end < start:
        raise ValueError(f"an entry has shape {shape} and bytes {start} to {end}")
    return StoredTensor(path, dtype, tuple(shape), offset + start, offset + end)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = {name: folder / name for name in sorted(set(weight_map.values()))}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{index} is not a readable index ({type(error).__name__}: {error}); download it "
                "again"
            ) from error
        lost = [
            name
            for name, path in paths.items()
            if not path.is_file() or path.parent.resolve() != folder.resolve()
        ]
        if lost:
            raise CheckpointError(
                f"{index.name} names files that are not in {folder}: {', '.join(lost[:_LISTED])}; "
                "download them as well"
            )
        return list(paths.values())
    found = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in found:
        return [folder / "model.safetensors"]
    if found:
        return found
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} has only pickle weights ({', '.join(pickled[:3])}), which can run code when "
            "read and are never opened; convert them with transformers: "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has no *.safetensors file; a model folder needs its weights")


def check_names(checkpoint: Checkpoint, params: Any, is_unused: Callable[[str], bool]) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the tensors of the tree, in their
    shapes.
    """
    wanted = {
        s.tensor: (s.rows, *param.shape[1:]) for param in param_leaves(params) for s in param.slices
    }
    there = checkpoint.names()
    for name in sorted(wanted.keys() & there):
        checkpoint.dtype(name)  # a quantized tensor is refused before anything is compiled
    missing = sorted(wanted.keys() - there)
    unexpected = sorted(n for n in there - wanted.keys() if not is_unused(n))
    misshapen = [
        f"{name}: the config says {list(wanted[name])}, the file has "
        f"{list(checkpoint.tensor(name).shape)}"
        for name in sorted(wanted.keys() & there)
        if checkpoint.tensor(name).shape != wanted[name]
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("tensors of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {checkpoint.folder} are not those its config.json describes; "
            f"{'; '.join(problems)}. Take config and weights from the same revision"
        )
