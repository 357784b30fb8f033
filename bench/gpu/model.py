"""Engines of published shapes with dummy weights, on any devices: real ones, or those of an H200
that is not there.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from ...engine.config import EngineConfig
from ...engine.kv_plan import KVPlan, Sizes, table_width
from ...engine.model_files import ModelFiles
from ...engine.model_source import ModelSource
from ...engine.startup import Builder
from ...layers.checkpoint import Checkpoint
from ...layers.models.registry import ModelInfo, read_model

SHAPES = Path(__file__).parent.parent / "shapes"
PAGE_SIZE, MAX_NUM_SEQS, MAX_BATCHED_TOKENS = 64, 256, 8192


def model_info(size: str, num_layers: int | None = None) -> ModelInfo:
    """The model of bench/shapes/<size>; num_layers: fewer than it has."""
    config = json.loads((SHAPES / size / "config.json").read_text("utf-8"))
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        return read_model(Path(folder))


def make_builder(
    size: str,
    mesh: Mesh,
    *,
    num_layers: int | None = None,
    platform: str = "cuda",
    **options: Any,
) -> Builder:
    """Of an engine with dummy weights. options: of EngineConfig."""
    info = model_info(size, num_layers)
    config = EngineConfig(
        load_format="dummy", tensor_parallel_size=mesh.size, max_num_seqs=MAX_NUM_SEQS, **options
    )
    files = ModelFiles(
        source=ModelSource(f"{size} llama shape", SHAPES / size, None),
        info=info,
        text=None,  # type: ignore[arg-type]  # nothing here reads or writes text
        checkpoint=None,
        dtype=np.dtype(ml_dtypes.bfloat16),
        eos_ids=frozenset(),
    )
    tokens = config.max_num_batched_tokens or MAX_BATCHED_TOKENS
    sizes = Sizes(platform, MAX_NUM_SEQS, tokens, config.page_size or PAGE_SIZE)
    return Builder(config, files, sizes, mesh)


def open_folder(folder: Path, mesh: Mesh, platform: str, dtype: Any, **options: Any) -> Builder:
    """Of an engine with the weights of a folder, but no tokenizer."""
    info = read_model(folder)
    files = ModelFiles(
        source=ModelSource(folder.name, folder),
        info=info,
        text=None,  # type: ignore[arg-type]
        checkpoint=Checkpoint(folder),
        dtype=np.dtype(dtype),
        eos_ids=frozenset(),
    )
    return Builder(EngineConfig(**options), files, Sizes(platform, 16, 256, 16), mesh)


def kv_plan(num_pages: int, max_model_len: int, page_size: int = PAGE_SIZE) -> KVPlan:
    return KVPlan(num_pages, max_model_len, table_width(max_model_len, page_size))
