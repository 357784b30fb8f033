"""Packed once: the second start takes what the first one left, and nothing else ever."""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from quire.cpu_kernels import packing
from quire.cpu_kernels.library import Library
from quire.engine import weight_loading
from quire.engine.config import EngineConfig
from quire.engine.model_files import open_model
from quire.engine.model_source import DEMO_FOLDER
from quire.engine.weight_loading import (
    LoadedWeights,
    WeightLoading,
    image_name,
    open_weight_cache,
)
from quire.layers.checkpoint import Checkpoint
from quire.layers.mesh import make_mesh
from quire.layers.param import Kind, linear_param, param_leaves
from quire.layers.quantization.registry import choose_format
from quire.layers.weight_cache import WeightCache
from quire.layers.weights import open_arena
from quire.pallas_kernels.registry import choose, cpu_library
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.skipif(
    not isinstance(cpu_library(), Library), reason="there are no C++ kernels here"
)
IMAGE_BYTES = 96 * 64 * 2  # of 70 outputs and 40 inputs, padded
PACKED = "packed, which the cache is being given"


@pytest.fixture(autouse=True)
def _small_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_loading, "LEAST_BYTES", 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """In two files."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"{file}.safetensors")
    return folder


def loading(model: Path, cache: Path, **options: Any) -> WeightLoading:
    config = EngineConfig(model=str(model), **options)
    files = open_model(config)
    weight_format = choose_format(files.dtype, choose("cpu", dtype=files.dtype))
    return WeightLoading(files, weight_format, make_mesh(1), open_weight_cache(config, cache))


def load(model: Path, cache: Path, **options: Any) -> tuple[LoadedWeights, list[str]]:
    """What was loaded, and said while the cache was written."""
    said: list[str] = []
    loaded = loading(model, cache, **options).load(0, lambda _: None, said.append)
    wait_for_cache()
    return loaded, said


def wait_for_cache() -> None:
    for thread in threading.enumerate():
        if thread.name == "keep-weights":
            thread.join()


def outcome(loaded: LoadedWeights) -> str:
    """What the last line says after seconds and size."""
    return loaded.lines[-1].split("B ", 1)[1]


def same(one: LoadedWeights, other: LoadedWeights) -> bool:
    def array_bytes(loaded: LoadedWeights) -> list[bytes]:
        return [np.asarray(array).tobytes() for array in jax.tree.leaves(loaded.tree)]

    return array_bytes(one) == array_bytes(other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_second_start_packs_nothing(
    model: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    first, said = load(model, tmp_path, dtype=dtype)
    assert (len(first.lines), outcome(first), said) == (1, PACKED, [])
    plain, _ = load(model, tmp_path, dtype=dtype, weight_cache_bytes=0)
    assert outcome(plain) == "packed"
    moved = model.rename(tmp_path / "moved")
    monkeypatch.setattr(weight_loading, "load_weights", None)
    second, _ = load(moved, tmp_path, dtype=dtype)
    assert outcome(second) == "in packed form from the cache"
    assert jax.tree.structure(first.tree) == jax.tree.structure(second.tree)
    assert same(first, second)
    assert same(plain, second)
    # jax reads them where they are.
    assert {a.unsafe_buffer_pointer() % 64 for a in jax.tree.leaves(second.tree)} == {0}


def test_progress_counts_all_bytes_either_way(model: Path, tmp_path: Path):
    counts = []
    for _ in range(2):
        told: list[int] = []
        loading(model, tmp_path).load(0, told.append, print)
        counts.append(sum(told))
        load(model, tmp_path)  # so that it is written
    assert counts[0] == counts[1] > 0


def test_a_damaged_file_is_said_and_packed_again(model: Path, tmp_path: Path):
    first, _ = load(model, tmp_path)
    (path,) = (tmp_path / "weights").iterdir()
    with path.open("r+b") as file:
        # Up to the sums; what was read of it must not stay where the packed form has zeros.
        file.write(b"\xff" * (path.stat().st_size - 1000))
    again, _ = load(model, tmp_path)
    said = f"{path} is truncated or damaged; the weights are packed again"
    assert (again.lines[0], outcome(again)) == (said, PACKED)
    assert same(first, again)
    assert outcome(load(model, tmp_path)[0]) == "in packed form from the cache"


def test_nothing_of_a_damaged_file_stays_in_the_padding(tmp_path: Path):
    save_file({"m.w.weight": np.ones((70, 40), ml_dtypes.bfloat16)}, tmp_path / "a.safetensors")
    params = {"w": linear_param("m.w.weight", (70, 40), ("mlp", "hidden"))}
    model = SimpleNamespace(params=lambda: params, is_unused=lambda name: False)
    files: Any = SimpleNamespace(info=SimpleNamespace(model=model), checkpoint=Checkpoint(tmp_path))
    dtype = np.dtype(ml_dtypes.bfloat16)
    weight_format = choose_format(dtype, choose("cpu", dtype=dtype))
    cache = WeightCache(tmp_path / "weights", 1 << 20)
    made = []
    for _ in range(2):
        loaded = WeightLoading(files, weight_format, make_mesh(1), cache).load(0, int, print)
        made.append(np.asarray(loaded.tree["w"].w).tobytes())
        wait_for_cache()
        (path,) = cache.folder.iterdir()
        path.write_bytes(b"\xff" * IMAGE_BYTES + path.read_bytes()[IMAGE_BYTES:])
    assert made[0] == made[1]
    assert len(made[0]) == IMAGE_BYTES


def test_a_cache_that_fails_is_said_and_the_start_goes_on(model: Path, tmp_path: Path):
    folder = tmp_path / "weights"
    folder.write_text("a file")
    loaded, said = load(model, tmp_path)
    name = loaded.lines[0].split("/")[-1].split(".")[0]
    assert loaded.lines[0] == (
        f"{folder / name}.weights cannot be opened (Not a directory); the weights are packed again"
    )
    assert said == [f"the packed weights are not kept: {folder} cannot be written (File exists)"]
    assert same(loaded, load(model, tmp_path, weight_cache_bytes=0)[0])


@pytest.mark.parametrize(
    ("options", "least"),
    [({"weight_cache_bytes": 0}, 1), ({"load_format": "dummy"}, 1), ({}, 1 << 40)],
    ids=["off", "dummy", "small"],
)
def test_nothing_is_kept_of_weights(
    model: Path,
    tmp_path: Path,
    options: dict[str, Any],
    least: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(weight_loading, "LEAST_BYTES", least)
    load(model, tmp_path, **options)
    assert not (tmp_path / "weights").exists()


def test_float16_is_not_packed_and_not_kept(model: Path, tmp_path: Path):
    loaded, _ = load(model, tmp_path, dtype="float16")
    assert outcome(loaded) == "read"
    assert not (tmp_path / "weights").exists()


def name(model: Path, change: Callable[[Any], Any] = lambda param: param, **options: Any) -> str:
    """Of the image of this model's weights, were its Params changed so."""
    made = loading(model, model, **options)
    params = [change(param) for param in param_leaves(made.files.info.model.params())]
    arena = open_arena(params, made.weight_format, made.mesh)
    layout = made.weight_format.layout()
    assert arena is not None
    assert layout is not None
    return image_name(Checkpoint(model), params, arena, layout)


def test_a_name_follows_from_all_that_the_bytes_follow_from(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [name(model)]
    assert name(model) == names[0]
    names.append(name(model, dtype="float32"))
    names.append(name(model, lambda p: replace(p, slices=p.slices[::-1])))
    names.append(name(model, lambda p: replace(p, kind=Kind.LINEAR) if p.kind is Kind.GATED else p))
    file = model / "a.safetensors"
    status = file.stat()
    # Another file with the same header, size and time of modification: only its last change tells.
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    names.append(name(model))
    os.utime(file)
    names.append(name(model))
    before = packing.pack

    def other(matrix: Any, first: int, shape: Any, packed: Any) -> None:
        before(matrix, first, shape, packed)
        packed.view(np.uint8)[...] = packed.view(np.uint8)[:, ::-1].copy()

    monkeypatch.setattr(packing, "pack", other)
    names.append(name(model))
    assert len({*names}) == len(names)
