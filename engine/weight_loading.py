"""The weights of an engine: at random, from the cache of their packed form, or from the checkpoint.

Whatever is wrong with the cache is said, and the checkpoint's files serve.
"""

import atexit
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ..layers.arena import Arena
from ..layers.checkpoint import Checkpoint, CheckpointError
from ..layers.param import param_leaves
from ..layers.quantization.registry import WeightFormat
from ..layers.weight_cache import LEAST_BYTES, WeightCache, WeightCacheError
from ..layers.weights import (
    dummy_weights,
    filled_weights,
    load_weights,
    open_arena,
    weight_bytes,
)
from .config import EngineConfig
from .errors import ModelError
from .memory import format_bytes
from .model_files import ModelFiles

Say = Callable[[str], None]
_NICE = 19  # compiling and serving come first
_AT_EXIT_S = 10.0


@dataclass(frozen=True)
class LoadedWeights:
    """The tree on its devices, and what to say about where it came from."""

    tree: Any
    lines: tuple[str, ...] = ()


def open_weight_cache(config: EngineConfig, folder: Path) -> WeightCache | None:
    """Beside the compiled programs in the cache folder; None: turned off."""
    if not config.weight_cache_bytes:
        return None
    return WeightCache(folder / "weights", config.weight_cache_bytes)


@dataclass(frozen=True)
class WeightLoading:
    """What weights there are to load, and onto what."""

    files: ModelFiles
    weight_format: WeightFormat
    mesh: Mesh
    cache: WeightCache | None

    def load(self, seed: int, progress: Callable[[int], None], say: Say) -> LoadedWeights:
        """seed: of dummy weights. say: told what goes wrong later, while the cache is written.
        Raises ModelError.
        """
        params, checkpoint = self.files.info.model.params(), self.files.checkpoint
        if checkpoint is None:
            return LoadedWeights(dummy_weights(params, self.weight_format, self.mesh, seed))
        started = time.perf_counter()
        size = weight_bytes(params, self.weight_format, self.mesh.size)
        arena, layout = self._open_arena(), self.weight_format.layout()

        def line(what: str) -> str:
            return f"weights in {time.perf_counter() - started:.1f} s: {format_bytes(size)} {what}"

        if self.cache is None or arena is None or layout is None or size < LEAST_BYTES:
            tree = self._from_checkpoint(checkpoint, progress, arena)
            return LoadedWeights(tree, (line("read" if layout is None else "packed"),))
        name, wrong = image_name(checkpoint, params, arena, layout), []
        try:
            if self.cache.read(name, arena.image):
                tree = filled_weights(params, self.weight_format, self.mesh, arena)
                progress(size)
                return LoadedWeights(tree, (line("in packed form from the cache"),))
        except WeightCacheError as error:
            wrong = [f"{error}; the weights are packed again"]
            arena = self._open_arena()
            assert arena
        tree = self._from_checkpoint(checkpoint, progress, arena)
        _start_keeping(self.cache, name, arena, say)
        return LoadedWeights(tree, (*wrong, line("packed, which the cache is being given")))

    def _open_arena(self) -> Arena | None:
        return open_arena(self.files.info.model.params(), self.weight_format, self.mesh)

    def _from_checkpoint(
        self, checkpoint: Checkpoint, progress: Callable[[int], None], arena: Arena | None
    ) -> Any:
        model = self.files.info.model
        try:
            return load_weights(
                checkpoint, model.params(), self.weight_format, self.mesh, model.is_unused,
                progress, arena,
            )  # fmt: skip
        except CheckpointError as error:
            raise ModelError(str(error)) from error


def image_name(checkpoint: Checkpoint, params: Any, arena: Arena, layout: str) -> str:
    """The same for the same bytes: a digest of all that they follow from."""
    declared = [
        (param.kind.value, param.shape, [(piece.tensor, piece.rows) for piece in param.slices])
        for param in param_leaves(params)
    ]
    told = json.dumps([checkpoint.identity(), layout, arena.offsets, declared])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _start_keeping(cache: WeightCache, name: str, arena: Arena, say: Say) -> None:
    """In a thread that only the end of the process waits for, and not long: what it leaves half
    written the next one writes anew or removes.
    """

    def keep() -> None:
        if sys.platform == "linux":  # there, of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            cache.keep(name, arena.image)
        except WeightCacheError as error:
            say(f"the packed weights are not kept: {error}")

    thread = threading.Thread(target=keep, name="keep-weights", daemon=True)
    thread.start()
    atexit.register(thread.join, _AT_EXIT_S)
