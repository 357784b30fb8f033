"""Weights over all devices there are: collected by test_sharded.py alone, in a process
that has several.

Which rows a shard holds is written here once more, head by head, from what it has to compute.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from quire.layers.checkpoint import Checkpoint, CheckpointError
from quire.layers.mesh import make_mesh
from quire.layers.models.llama import Decoder, DecoderSpec
from quire.layers.param import param_leaves
from quire.layers.quantization.plain import Plain
from quire.layers.rope import RopeConfig
from quire.layers.weights import dummy_weights, load_weights, weight_bytes
from safetensors.numpy import save_file

N = jax.device_count()
F32 = Plain(np.dtype(np.float32))
HEADS, DIM, HIDDEN, MLP, VOCAB = 8, 4, 6, 24, 70


def decoder(kv_heads: int, *, tie_embeddings: bool = False) -> Decoder:
    rope = RopeConfig("default", 1e4, DIM, 64)
    return Decoder(
        DecoderSpec(
            VOCAB, HIDDEN, MLP, HEADS, kv_heads, DIM, 1e-6, rope, tie_embeddings, (None,),
            qkv_bias=True, out_bias=True, mlp_bias=True, head_norm=True,
        )
    )  # fmt: skip


def write(model: Decoder, folder: Path, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        s.tensor: (rng.normal(0, scale, (s.rows, *p.shape[1:]))).astype(np.float32)
        for p in param_leaves(model.params())
        for s in p.slices
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load(model: Decoder, folder: Path, weight_format: Plain = F32) -> Any:
    told: list[int] = []
    mesh = make_mesh(N)
    tree = load_weights(
        Checkpoint(folder), model.params(), weight_format, mesh, model.is_unused, told.append
    )
    assert sum(told) == weight_bytes(model.params(), weight_format, N)
    return tree


def shards(array: jax.Array) -> list[np.ndarray]:
    """What each device holds."""
    by_device = {s.device.id: np.asarray(s.data) for s in array.addressable_shards}
    return [by_device[i] for i in range(N)]


def heads(tensor: np.ndarray, wanted: list[int]) -> np.ndarray:
    """Rows of some heads."""
    return np.concatenate([tensor[h * DIM : (h + 1) * DIM] for h in wanted])


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_each_shard_holds_the_rows_of_its_heads(kv_heads: int, tmp_path: Path) -> None:
    model = decoder(kv_heads)
    t = write(model, tmp_path)
    block = load(model, tmp_path).blocks[0]
    for shard in range(N):
        mine = list(range(shard * HEADS // N, (shard + 1) * HEADS // N))
        their_kv = sorted({h * kv_heads // HEADS for h in mine})
        for kind, got in (
            ("weight", shards(block.attention.qkv.w)[shard]),
            ("bias", shards(block.attention.qkv_bias)[shard]),
        ):
            q, k, v = (t[f"model.layers.0.self_attn.{n}_proj.{kind}"] for n in "qkv")
            want = np.concatenate([heads(q, mine), heads(k, their_kv), heads(v, their_kv)])
            np.testing.assert_array_equal(got, want)
        columns = t["model.layers.0.self_attn.o_proj.weight"].T
        np.testing.assert_array_equal(shards(block.attention.out.w)[shard].T, heads(columns, mine))


def test_each_shard_holds_its_gates_and_its_ups(tmp_path: Path) -> None:
    model = decoder(2)
    t = write(model, tmp_path)
    mlp = load(model, tmp_path).blocks[0].mlp
    for shard in range(N):
        rows = slice(shard * MLP // N, (shard + 1) * MLP // N)
        for kind, got in (("weight", mlp.gate_up.w), ("bias", mlp.gate_up_bias)):
            gate, up = (t[f"model.layers.0.mlp.{n}_proj.{kind}"][rows] for n in ("gate", "up"))
            np.testing.assert_array_equal(shards(got)[shard], np.concatenate([gate, up]))
        down = t["model.layers.0.mlp.down_proj.weight"]
        np.testing.assert_array_equal(shards(mlp.down.w)[shard], down[:, rows])
        # Added once, after the sum over shards: each has all of it.
        bias = t["model.layers.0.mlp.down_proj.bias"]
        np.testing.assert_array_equal(shards(mlp.down_bias)[shard], bias)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_padded_with_zeros_to_whole_words(tied: bool, tmp_path: Path) -> None:
    model = decoder(2, tie_embeddings=tied)
    t = write(model, tmp_path)
    tree = load(model, tmp_path)
    tables = {"model.embed_tokens.weight": tree.embedding}
    if not tied:
        tables["lm_head.weight"] = tree.head
    for name, table in tables.items():
        parts = shards(table.w)
        assert {len(part) % 32 for part in parts} == {0}
        together = np.concatenate(parts)
        np.testing.assert_array_equal(together[:VOCAB], t[name])
        assert not together[VOCAB:].any()


def test_bytes_of_each_device_are_those_of_the_plan(tmp_path: Path) -> None:
    model = decoder(2)
    write(model, tmp_path)
    tree = load(model, tmp_path)
    for device in jax.devices():
        held = sum(
            s.data.nbytes
            for a in jax.tree.leaves(tree)
            for s in a.addressable_shards
            if s.device == device
        )
        assert held == weight_bytes(model.params(), F32, N)
    assert held < weight_bytes(model.params(), F32, 1)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_dummy_weights_are_the_same_on_any_number_of_devices(kv_heads: int, tmp_path: Path) -> None:
    model = decoder(kv_heads)
    alone = dummy_weights(model.params(), F32, make_mesh(1), 5)
    # What one device holds are the tensors, joined; as a checkpoint they are divided as above.
    arrays = [np.asarray(a) for a in jax.tree.leaves(alone)]
    tensors = {}
    for param, array in zip(param_leaves(model.params()), arrays, strict=True):
        ends = np.cumsum([s.rows for s in param.slices])
        for piece, part in zip(param.slices, np.split(array, ends[:-1]), strict=True):
            tensors[piece.tensor] = np.ascontiguousarray(part)
    save_file(tensors, tmp_path / "model.safetensors")
    expected, got = load(model, tmp_path), dummy_weights(model.params(), F32, make_mesh(N), 5)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        # Another fusion may round the last bit of a draw otherwise.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=0)


def test_values_beyond_float16_are_refused_on_any_shard(tmp_path: Path) -> None:
    model = decoder(2)
    write(model, tmp_path, scale=1e6)
    with pytest.raises(CheckpointError, match="values beyond float16's 65504"):
        load(model, tmp_path, Plain(np.dtype(np.float16)))
