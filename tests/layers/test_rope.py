"""Frequencies against transformers' own functions; rotation against complex numbers.

Those functions are written for torch, which is not installed: a few lines of numpy stand in for it.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers.modeling_rope_utils as theirs
from quire.layers.rope import Rope, RopeConfig, build_rope, rope_types, rotary_tables
from quire.pallas_kernels.heads import rotate

MAX_POSITION = 4096


class _Tensor(np.ndarray):
    def to(self, device: Any = None, dtype: Any = None) -> "_Tensor":
        return self if dtype is None else self.astype(dtype)


_TORCH = SimpleNamespace(
    arange=lambda *a, dtype=None: np.arange(*a, dtype=dtype).view(_Tensor),
    clamp=np.clip,
    where=np.where,
    int64=np.int64,
    float=np.float64,
    float32=np.float64,
    Tensor=_Tensor,
)


def expected(config: RopeConfig) -> tuple[np.ndarray, float]:
    options = {"rope_theta": config.theta, "rope_type": config.rope_type, **dict(config.options)}
    if config.rope_type == "yarn":
        options.setdefault("original_max_position_embeddings", config.max_position)
        options.setdefault("factor", None)
    stand_in = SimpleNamespace(
        rope_parameters=options,
        head_dim=config.head_dim,
        hidden_size=4 * config.head_dim,
        num_attention_heads=4,
        max_position_embeddings=config.max_position,
        standardize_rope_params=lambda: None,
    )
    return theirs.ROPE_INIT_FUNCTIONS[config.rope_type](stand_in, "cpu")


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
TYPES = [
    ("linear", {"factor": 2.5}),
    ("dynamic", {"factor": 2.0}),
    ("llama3", LLAMA3),
    ("llama3", LLAMA3 | {"factor": 32, "original_max_position_embeddings": 8192}),
    ("yarn", YARN),
    ("yarn", {"factor": 4.0}),
    ("yarn", {"original_max_position_embeddings": 1024}),
    ("yarn", YARN | {"beta_fast": 16, "beta_slow": 2}),
    ("yarn", YARN | {"beta_fast": 0, "beta_slow": 0}),
    ("yarn", YARN | {"truncate": False}),
    ("yarn", YARN | {"attention_factor": 1.5}),
    ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}),
    ("yarn", YARN | {"mscale": 1.0, "mscale_all_dim": 0}),
    ("yarn", YARN | {"factor": 0.5}),
    ("yarn", YARN | {"original_max_position_embeddings": 8}),  # the whole ramp below 0
]


@pytest.mark.parametrize(("rope_type", "options"), TYPES)
@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 128), (5e6, 64), (1e4, 16)])
def test_rope_is_what_transformers_computes(
    rope_type: str,
    options: dict[str, Any],
    theta: float,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(theirs, "torch", _TORCH, raising=False)
    config = RopeConfig(rope_type, theta, head_dim, MAX_POSITION, tuple(sorted(options.items())))
    rope = build_rope(config)
    frequency, factor = expected(config)
    np.testing.assert_allclose(rope.inverse_frequency, frequency, rtol=1e-12)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    assert len(rope.inverse_frequency) == head_dim // 2


def test_default_rope_is_theta_to_the_minus_2i_over_d():
    rope = build_rope(RopeConfig("default", 10000.0, 8, MAX_POSITION))
    assert rope.inverse_frequency == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert rope.attention_factor == 1.0


def test_every_type_is_tested_here():
    assert {"default", *(name for name, _ in TYPES)} == set(rope_types())


def test_rotate_turns_pairs_of_the_two_halves():
    """(x[i], x[i + d/2]) is a complex number, turned by position x frequency (RoFormer eq. 34)."""
    rope = Rope((1.0, 0.3, 0.01), attention_factor=1.25)
    positions = np.array([0, 1, 257, 131_071], np.int32)
    x = np.random.default_rng(0).normal(size=(4, 2, 6)).astype(np.float32)
    turned = np.asarray(rotate(x, rotary_tables(positions, rope)))
    pairs = x[..., :3] + 1j * x[..., 3:]
    angle = positions[:, None].astype(np.float32) * np.float32(rope.inverse_frequency)
    want = pairs * np.exp(1j * angle.astype(np.float64))[:, None] * 1.25
    # f32 sine and cosine of an angle of 131071.
    np.testing.assert_allclose(turned[..., :3], want.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 3:], want.imag, atol=1e-5)


def test_rotate_tells_neighbouring_positions_apart_in_bfloat16():
    import jax.numpy as jnp

    rope = Rope((1.0,))
    x = np.ones((2, 1, 2), jnp.bfloat16)
    turned = np.asarray(rotate(x, rotary_tables(np.array([256, 257], np.int32), rope)))
    assert turned.dtype == np.float32
    assert abs(turned[0] - turned[1]).max() > 0.1
