"""The contract of paged_attention, rule by rule, and the registry that runs it."""

from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from quire.pallas_kernels import reference, registry
from quire.pallas_kernels.checks import (
    AttentionBatch,
    AttentionShape,
    AttentionSpec,
    ContractError,
    KVPages,
    LayerPages,
    PlannedBatch,
    check_paged_attention,
)
from quire.pallas_kernels.registry import Implementation, Linear, Ops, choose

TOKENS, ROWS, WIDTH, ITEMS, HEADS = 6, 3, 5, 4, 4


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def whole(*shape: int) -> jax.ShapeDtypeStruct:
    return array(*shape, dtype=jnp.int32)


K = array(9, 2, 16, 8)
BATCH_FIELDS = {field.name for field in fields(AttentionBatch)}


def arguments(**changes: Any) -> dict[str, Any]:
    """A sound call, some arguments replaced; fields of the batch go by their own names."""
    batch = AttentionBatch(
        **dict.fromkeys(
            ("attend_from", "attend_to", "token_row", "write_page", "write_offset"), whole(TOKENS)
        ),
        page_table=whole(ROWS, WIDTH),
        num_tokens=whole(),
        num_single=whole(),
        num_items=whole(),
        **dict.fromkeys(("item_row", "item_first", "item_count"), whole(ITEMS)),
    )
    batch = replace(batch, **{k: v for k, v in changes.items() if k in BATCH_FIELDS})
    sound = {
        "q": array(TOKENS, HEADS, 8),
        "k_new": array(TOKENS, 2, 8),
        "v_new": array(TOKENS, 2, 8),
        "kv": KVPages(K, K),
        "batch": batch,
        "spec": AttentionSpec(1.0),
        "sinks": None,
    }
    return sound | {k: v for k, v in changes.items() if k not in BATCH_FIELDS}


ALL_LAYERS = LayerPages(array(3, *K.shape), array(3, *K.shape), whole())
LATENT = {"kv": KVPages(K, None), "v_new": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sinks": array(HEADS)},
        {"kv": ALL_LAYERS},
        LATENT | {"spec": AttentionSpec(1.0, value_dim=8)},
        {"kv": KVPages(K, array(9, 2, 16, 4)), "v_new": array(TOKENS, 2, 4)},
    ],
)
def test_a_sound_call_passes(changes: dict[str, Any]):
    check_paged_attention(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": array(6, 32)}, "q must be [tokens, heads, head_dim], got (6, 32)"),
        ({"q": array(6, 3, 8)}, "heads must be a multiple of kv_heads: 3, 2"),
        ({"q": array(6, 4, 16)}, "q has head_dim 16, the cache has 8"),
        (
            {"k_new": array(5, 2, 8)},
            "k_new must be [tokens, kv_heads, head_dim] = (6, 2, 8), got (5, 2, 8)",
        ),
        ({"v_new": None}, "v_new and the cache's v must both be there or not"),
        ({"kv": KVPages(K, None)}, "v_new and the cache's v must both be there or not"),
        (LATENT, "a latent cache needs 0 < value_dim <= 8, got None"),
        (
            LATENT | {"spec": AttentionSpec(1.0, value_dim=9)},
            "a latent cache needs 0 < value_dim <= 8, got 9",
        ),
        (
            {"v_new": array(6, 2, 7)},
            "v_new must be [tokens, kv_heads, value_dim] = (6, 2, 8), got (6, 2, 7)",
        ),
        (
            {"kv": KVPages(K, array(8, 2, 16, 8))},
            "k and v pages differ: float32(9, 2, 16, 8), float32(8, 2, 16, 8)",
        ),
        (
            {"kv": KVPages(K, array(9, 2, 16, 8, dtype=jnp.float16))},
            "k and v pages differ: float32(9, 2, 16, 8), float16(9, 2, 16, 8)",
        ),
        (
            {"kv": KVPages(array(9, 2, 8), K)},
            "k pages must be [pages, kv_heads, page_size, head_dim], got (9, 2, 8)",
        ),
        (
            {"kv": LayerPages(K, K, whole())},
            "k pages must be [layers, pages, kv_heads, page_size, head_dim], got (9, 2, 16, 8)",
        ),
        (
            {"kv": LayerPages(array(3, *K.shape), array(2, *K.shape), whole())},
            "k and v pages differ: float32(3, 9, 2, 16, 8), float32(2, 9, 2, 16, 8)",
        ),
        (
            {"kv": LayerPages(array(3, *K.shape), array(3, *K.shape), whole(1))},
            "layer must be i32[], got int32[1]",
        ),
        (
            {"kv": KVPages(array(1, 2, 16, 8), array(1, 2, 16, 8))},
            "the cache needs the null page and one more",
        ),
        ({"sinks": array(3)}, "sinks must be [heads] = (4,), got (3,)"),
        ({"attend_to": whole(5)}, "attend_to must be i32[6], got (5,)"),
        ({"write_page": array(6)}, "write_page must be i32, got float32"),
        ({"page_table": whole(9)}, "page_table must be [rows, width], got (9,)"),
        ({"page_table": array(3, 5, dtype=jnp.int16)}, "page_table must be i32, got int16"),
        ({"item_count": whole(3)}, "item_count must be i32[4], got (3,)"),
        ({"num_items": whole(1)}, "num_items must be i32[], got (1,)"),
    ],
)
def test_a_broken_contract_is_refused_with_its_rule(changes: dict[str, Any], message: str):
    with pytest.raises(ContractError) as caught:
        check_paged_attention(**arguments(**changes))
    assert str(caught.value) == message


def test_dispatch_checks_before_it_runs():
    never = Implementation("never", ("cpu",), lambda *_: pytest.fail("it ran"))
    ops = Ops(never, Linear("never", ("cpu",)))
    given = arguments()
    step = PlannedBatch(given["batch"], None)
    for columns, rule in (
        (7 * 8, "heads must be a multiple"),
        (61, "qkv must be"),
        (8, "qkv must"),
    ):
        with pytest.raises(ContractError, match=rule):
            ops.attend(array(6, columns), given["kv"], step, given["spec"])


@pytest.mark.parametrize(("name", "kv"), [("native", KVPages(K, K)), ("jnp", ALL_LAYERS)])
def test_pages_in_the_form_of_another_implementation_are_refused(name: str, kv: Any):
    given = arguments(kv=kv)
    step = PlannedBatch(given["batch"], None)
    with pytest.raises(ContractError, match=f"{name} takes (Layer|KV)Pages, got {type(kv)}"):
        choose("cpu", attention=name).attend(array(6, 64), kv, step, given["spec"])


def test_choose_takes_the_first_that_fits_and_names_the_rest():
    assert choose("cpu", attention="jnp").attention.name == "jnp"
    assert choose("cuda").names() == {"paged_attention": "jnp", "linear": "xla"}
    assert choose("cuda", attention="reference").attention.run is reference.paged_attention
    message = (
        r"no paged_attention named 'fast' for 'cpu'; there are mosaic \(cuda\), native \(cpu\), "
    )
    with pytest.raises(LookupError, match=message):
        choose("cpu", attention="fast")


def test_weights_are_multiplied_by_the_first_that_takes_their_dtype():
    assert choose("cuda").linear.name == "xla"  # float32
    for dtype in (jnp.bfloat16, jnp.float16):
        assert choose("cuda", dtype=dtype).linear.name == "mosaic"
        assert choose("cpu", linear="mosaic-interpreted", dtype=dtype).linear.kernel is not None
        assert choose("cpu", dtype=dtype).linear.kernel is None
    assert choose("cuda", linear="xla", dtype=jnp.bfloat16).linear.kernel is None
    with pytest.raises(LookupError, match="no linear named 'mosaic' for 'cpu' and float32 weights"):
        choose("cpu", linear="mosaic")


def test_a_shape_that_is_not_served_falls_to_the_next(monkeypatch: pytest.MonkeyPatch):
    """And the items are as large as the chosen one says."""

    def never(*_: Any) -> Any:
        pytest.fail("it ran")

    fast = Implementation(
        "fast",
        ("cuda",),
        never,
        serves=lambda shape: shape.head_dim == 64,
        queries_per_item=lambda shape: 128 // (shape.heads // shape.kv_heads),
    )
    slow = Implementation("slow", ("cuda",), never)
    monkeypatch.setattr(registry, "PAGED_ATTENTION", (fast, slow))
    shape = AttentionShape(8, 2, 64, 64, 16, jnp.bfloat16)
    ops = choose("cuda", shape=shape)
    assert (ops.attention, ops.queries_per_item) == (fast, 32)
    other = replace(shape, head_dim=40)
    for ops in (choose("cuda", shape=other), choose("cuda")):
        assert (ops.attention, ops.queries_per_item) == (slow, 16)
    with pytest.raises(LookupError, match=r"named 'fast' for 'cuda' that serves .*head_dim=40"):
        choose("cuda", attention="fast", shape=other)
