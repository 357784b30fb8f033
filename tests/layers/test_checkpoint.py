"""Safetensors in and out: what is read, and every way in which a file can be wrong."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from quire.layers.checkpoint import Checkpoint, CheckpointError, check_names
from quire.layers.linear import DenseWeight
from quire.layers.mesh import make_mesh
from quire.layers.models.llama import Decoder, DecoderSpec
from quire.layers.param import Kind, fused_param, linear_param, map_params, vector_param
from quire.layers.quantization.plain import Plain
from quire.layers.rope import RopeConfig
from quire.layers.weights import dummy_weights, load_weights, weight_bytes

NAMES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I8": np.int8,
}  # fmt: skip
F32 = Plain(np.dtype(np.float32))


def safetensors(tensors: dict[str, np.ndarray], **changes: Any) -> bytes:
    """A file's bytes, written here from the format's page; changes replace header entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        dtype = next(k for k, v in NAMES.items() if array.dtype == np.dtype(v))
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return with_header(json.dumps(header | changes).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write(folder: Path, tensors: dict[str, np.ndarray], file: str = "model.safetensors") -> None:
    (folder / file).write_bytes(safetensors(tensors))


def noise(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(dtype)


PARAMS = {
    "qkv": fused_param({n: (f"{n}.weight", r) for n, r in (("q", 4), ("k", 2), ("v", 2))}, 3,
                       ("heads", "hidden")),
    "bias": vector_param({"q": ("q.bias", 4), "k": ("k.bias", 2)}, "heads", fill=0.0),
    "out": linear_param("o.weight", (3, 4), ("hidden", "heads")),
}  # fmt: skip
TENSORS = {
    "k.weight": noise(2, 3, seed=1),
    "v.weight": noise(2, 3, seed=2),
    "q.weight": noise(4, 3),
    "o.weight": noise(3, 4),
    "k.bias": noise(2),
    "q.bias": noise(4),
}


def load(folder: Path, weight_format: Plain = F32, is_unused: Any = lambda name: False) -> Any:
    made: list[int] = []
    tree = load_weights(
        Checkpoint(folder), PARAMS, weight_format, make_mesh(1), is_unused, made.append
    )
    assert sum(made) == weight_bytes(PARAMS, weight_format, 1)
    return tree


def refusal(action: Any, *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        action(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_fused_tensors_are_joined_in_order_and_cast(source: Any, target: Any, tmp_path: Path):
    tensors = {name: array.astype(source) for name, array in TENSORS.items()}
    write(tmp_path, tensors)
    tree = load(tmp_path, Plain(np.dtype(target)))
    assert isinstance(tree["qkv"], DenseWeight)
    assert isinstance(tree["bias"], jax.Array)
    for got, names in (
        (tree["qkv"].w, ("q.weight", "k.weight", "v.weight")),
        (tree["bias"], ("q.bias", "k.bias")),
        (tree["out"].w, ("o.weight",)),
    ):
        assert got.dtype == np.dtype(target)
        np.testing.assert_array_equal(
            got, np.concatenate([tensors[n] for n in names]).astype(target)
        )


def test_shards_are_found_by_the_index_or_by_their_ending(tmp_path: Path):
    names = sorted(TENSORS)
    shards = {"a-1-of-2.safetensors": names[:3], "a-2-of-2.safetensors": names[3:]}
    for file, part in shards.items():
        write(tmp_path, {name: TENSORS[name] for name in part}, file)
    np.testing.assert_array_equal(load(tmp_path)["out"].w, TENSORS["o.weight"])
    # With an index, other files are not touched.
    (tmp_path / "other.safetensors").write_bytes(b"junk")
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    np.testing.assert_array_equal(load(tmp_path)["out"].w, TENSORS["o.weight"])


def test_one_file_of_the_usual_name_wins_over_its_neighbours(tmp_path: Path):
    write(tmp_path, TENSORS)
    (tmp_path / "consolidated.safetensors").write_bytes(b"junk")
    assert Checkpoint(tmp_path).names() == TENSORS.keys()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    """Not only mid-tensor: at each byte of the length, and around every border."""
    whole = safetensors(TENSORS)
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    cuts = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(whole) - 1}
    for cut in sorted(cuts):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        message = refusal(Checkpoint, tmp_path)
        assert str(tmp_path / "model.safetensors") in message
        assert message.endswith("the file is truncated or damaged; download it again"), cut


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            struct.pack("<Q", 2**63) + b"{}",
            f"says its header has {2**63} bytes but the file has 10",
        ),
        (with_header(b"{"), "has an unreadable header (JSONDecodeError"),
        (with_header(b"\xff\xff"), "has an unreadable header (UnicodeDecodeError"),
        (with_header(b"[1]"), "has an unreadable header (AttributeError"),
        (with_header(b"[" * 200_000), "has an unreadable header (RecursionError"),
        (with_header(b'{"a": 1, "a": 2}'), "(ValueError: a name is there twice)"),
        (safetensors({}, a=3), "has an unreadable header (TypeError"),
        (safetensors({}, a={"dtype": "F32"}), "has an unreadable header (KeyError: 'shape')"),
        (safetensors({}, a=ENTRY | {"dtype": ["F32"]}), "an entry has dtype ['F32']"),
        (safetensors({}, a=ENTRY | {"shape": 2}), "an entry has dtype 'F32' and shape 2"),
        (safetensors({}, a=ENTRY | {"shape": [-1, -2]}), "an entry has shape [-1, -2] and bytes"),
        (safetensors({}, a=ENTRY | {"shape": ["2"]}), "an entry has shape ['2']"),
        (safetensors({}, a=ENTRY | {"data_offsets": [8]}), "has an unreadable header (ValueError"),
        (safetensors({}, a=ENTRY | {"data_offsets": ["0", 8]}), "shape [2] and bytes 0 to 8"),
        (safetensors({}, a=ENTRY | {"data_offsets": [8, 0]}), "shape [2] and bytes 8 to 0"),
        (safetensors({}, a=ENTRY), "tensor 'a' ends at byte"),
        (safetensors({}, a=ENTRY | {"data_offsets": [0, 2**70]}), "tensor 'a' ends at byte"),
        (
            safetensors({}, a=ENTRY | {"data_offsets": [0, 0], "shape": [2**32, 2**32]}),
            "tensor 'a' of shape [4294967296, 4294967296] does not fill its 0 bytes",
        ),
        (
            safetensors({"b": noise(3)}, a=ENTRY | {"data_offsets": [4, 12]}),
            "tensor 'a' starts at byte",  # inside b
        ),
        (
            safetensors({}, a=ENTRY | {"data_offsets": [4, 12]}) + bytes(12),
            "the one before it ends at",  # after a hole
        ),
        (safetensors({"b": noise(3)}) + b"more", "the tensors end at byte"),
        (
            safetensors({"b": noise(3)}, b=ENTRY | {"data_offsets": [0, 12]}),
            "tensor 'b' of shape [2] does not fill its 12 bytes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_damaged_file_is_refused(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(content)
    said = refusal(Checkpoint, tmp_path)
    assert message in said
    assert said.endswith("the file is truncated or damaged; download it again")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path):
    for file in ("a.safetensors", "b.safetensors"):
        write(tmp_path, {"q.bias": noise(4)}, file)
    message = refusal(Checkpoint, tmp_path)
    assert message.startswith("tensor 'q.bias' is in both a.safetensors and b.safetensors of ")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a readable index (JSONDecodeError"),
        ("[]", "is not a readable index (TypeError"),
        ("{}", "is not a readable index (KeyError: 'weight_map')"),
        ('{"weight_map": {"a": 3}}', "is not a readable index (TypeError"),
        ('{"weight_map": {"a": ["x"]}}', "is not a readable index (TypeError"),
        ('{"weight_map": {"a": "lost.safetensors"}}', "names files that are not in"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', ": ../outside.safetensors; download"),
        ('{"weight_map": {"a": "OUTSIDE"}}', "outside.safetensors; download them as well"),
        ('{"weight_map": {"a": "sub"}}', "names files that are not in"),
    ],
)
def test_an_index_that_cannot_be_followed(index: str, message: str, tmp_path: Path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(safetensors(TENSORS))
    text = index.replace("OUTSIDE", str(outside))
    (folder / "model.safetensors.index.json").write_text(text)
    assert message in refusal(Checkpoint, folder)


def test_files_of_a_hub_cache_are_links_and_are_followed(tmp_path: Path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    write(blobs, TENSORS, "0123")
    (folder / "a.safetensors").symlink_to(blobs / "0123")
    weight_map = dict.fromkeys(TENSORS, "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint(folder).names() == TENSORS.keys()


def test_a_folder_without_readable_weights(tmp_path: Path):
    message = refusal(Checkpoint, tmp_path)
    assert message == f"{tmp_path} has no *.safetensors file; a model folder needs its weights"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = refusal(Checkpoint, tmp_path)
    assert (
        "only pickle weights (pytorch_model.bin), which can run code when read and are" in message
    )
    assert "safe_serialization=True" in message


def test_missing_unexpected_and_misshapen_tensors_are_listed_exactly(tmp_path: Path):
    tensors = {k: v for k, v in TENSORS.items() if k not in ("k.bias", "v.weight")}
    write(tmp_path, tensors | {"o.weight": noise(4, 3), "extra": noise(1), "old": noise(1)})
    message = refusal(load, tmp_path, F32, lambda name: name == "old")
    assert message == (
        f"the weights in {tmp_path} are not those its config.json describes; 2 missing tensors: "
        "k.bias, v.weight; 1 unexpected tensors: extra; 1 tensors of another shape: o.weight: the "
        "config says [3, 4], the file has [4, 3]. Take config and weights from the same revision"
    )
    write(tmp_path, TENSORS | {f"extra{i:02}": noise(1) for i in range(25)})
    message = refusal(load, tmp_path)
    assert "25 unexpected tensors: extra00" in message
    assert "extra19, …. Take" in message


def test_a_quantized_tensor_is_refused_before_it_is_read(tmp_path: Path):
    write(tmp_path, TENSORS | {"o.weight": np.zeros((3, 4), np.int8)})
    checkpoint = Checkpoint(tmp_path)
    message = refusal(check_names, checkpoint, PARAMS, lambda name: False)
    assert (
        "tensor 'o.weight' has dtype I8, and unquantized weights are F64, F32, F16, BF16" in message
    )
    assert message.endswith("use an unquantized checkpoint")
    # One that nobody reads does no harm.
    write(tmp_path, TENSORS | {"old": np.zeros(3, np.int8)})
    load(tmp_path, F32, lambda name: name == "old")


def decoder(*, tie_embeddings: bool) -> Decoder:
    rope = RopeConfig("default", 1e4, 4, 64)
    return Decoder(DecoderSpec(16, 8, 12, 2, 1, 4, 1e-6, rope, tie_embeddings, (None,)))


@pytest.mark.parametrize(
    ("tensor", "tied", "is_unused"),
    [
        ("lm_head.weight", True, True),
        ("lm_head.weight", False, False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False, True),
        ("model.layers.0.self_attn.q_proj.scale", True, False),
    ],
)
def test_tensors_that_a_model_passes_over(tensor: str, tied: bool, is_unused: bool, tmp_path: Path):
    model = decoder(tie_embeddings=tied)
    params = model.params()
    names = {s.tensor: (s.rows, *p.shape[1:]) for p in jax.tree.leaves(params) for s in p.slices}
    assert ("lm_head.weight" in names) is not tied
    write(tmp_path, {name: noise(*shape) for name, shape in names.items()} | {tensor: noise(16, 8)})
    assert model.is_unused(tensor) is is_unused
    if tensor in names or is_unused:
        check_names(Checkpoint(tmp_path), params, model.is_unused)
    else:
        message = refusal(check_names, Checkpoint(tmp_path), params, model.is_unused)
        assert f"1 unexpected tensors: {tensor}." in message


def test_dummy_weights_follow_from_the_seed_and_differ_by_tensor():
    params = decoder(tie_embeddings=False).params()
    trees = {
        seed: jax.tree.map(np.asarray, dummy_weights(params, F32, make_mesh(1), seed))
        for seed in (0, 1, 2**40, -1)
    }
    again = dummy_weights(params, F32, make_mesh(1), 2**40)
    jax.tree.map(np.testing.assert_array_equal, trees[2**40], again)
    embeddings = {tree.embedding.w.tobytes() for tree in trees.values()}
    assert len(embeddings) == 4
    tree = trees[0]
    assert not np.array_equal(tree.embedding.w, tree.head.w)  # the same shape
    assert abs(np.std(tree.embedding.w) - 0.02) < 0.005
    np.testing.assert_array_equal(tree.norm, np.ones(8))
    kinds = map_params(lambda p: p.kind, params)
    assert (kinds.embedding, kinds.norm) == (Kind.EMBEDDING, Kind.VECTOR)
    shapes = map_params(lambda p: p.shape, params)
    assert tree.blocks[0].mlp.gate_up.w.shape == shapes.blocks[0].mlp.gate_up
