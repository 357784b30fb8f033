"""Rotary position embeddings and the ways in which checkpoints stretch them.

A Rope is static: inverse frequencies as a tuple of floats and one attention factor. Everything is
computed in float64 on the host, as transformers does in float32 to within rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """inverse_frequency: [head_dim / 2] radians a position; attention_factor scales cos and sin
    (yarn).
    """

    inverse_frequency: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class RopeConfig:
    """The rope of one kind of layer, as a checkpoint states it. `options` are the keys of its rope
    type.
    """

    rope_type: str
    theta: float
    head_dim: int
    max_position: int  # max_position_embeddings of the config
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)


def rotary_tables(positions: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32[tokens, head_dim] each, as rotate of pallas_kernels/heads.py wants them.
    positions: absolute, i32[tokens].
    """
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(
        rope.inverse_frequency, jnp.float32
    )
    cos, sin = jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def build_rope(config: RopeConfig) -> Rope:
    """The frequencies of a rope type. Raises KeyError for an unknown type (the config reader names
    it first).
    """
    return _ROPE_BY_TYPE[config.rope_type](config)


def rope_types() -> tuple[str, ...]:
    return tuple(_ROPE_BY_TYPE)


def _base(config: RopeConfig) -> np.ndarray:
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    return 1.0 / config.theta**exponent


def _default(config: RopeConfig) -> Rope:
    return Rope(tuple(_base(config).tolist()))


def _linear(config: RopeConfig) -> Rope:
    """Positions divided by a factor (Chen et al. 2023, section 2.2)."""
    return Rope(tuple((_base(config) / float(config.option("factor"))).tolist()))


def _llama3(config: RopeConfig) -> Rope:
    """Llama 3.1: long wavelengths stretched by `factor`, short ones kept, a ramp between."""
    factor, low, high = (
        float(config.option(k)) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = float(config.option("original_max_position_embeddings"))
    base = _base(config)
    wavelength = 2 * math.pi / base
    # Share of the unstretched frequency: 0 for wavelengths over original/low, 1 under
    # original/high.
    kept = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return Rope(tuple((kept * base + (1 - kept) * base / factor).tolist()))


def _yarn(config: RopeConfig) -> Rope:
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4), with the options DeepSeek added to it."""
    original = float(config.option("original_max_position_embeddings") or config.max_position)
    factor = config.option("factor")
    factor = float(factor) if factor is not None else config.max_position / original
    base = _base(config)
    half = config.head_dim // 2

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension that turns this often over the original context."""
        turns = math.log(original / (rotations * 2 * math.pi))
        return config.head_dim * turns / (2 * math.log(config.theta))

    low = dimension_of(float(config.option("beta_fast") or 32))
    high = dimension_of(float(config.option("beta_slow") or 1))
    if config.option("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequency = base * (1 - ramp) + base / factor * ramp
    return Rope(tuple(frequency.tolist()), _yarn_attention_factor(config, factor))


def _yarn_attention_factor(config: RopeConfig, factor: float) -> float:
    given = config.option("attention_factor")
    if given is not None:
        return float(given)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all = config.option("mscale"), config.option("mscale_all_dim")
    if mscale and mscale_all:
        return temperature(float(mscale)) / temperature(float(mscale_all))
    return temperature(1.0)


_ROPE_BY_TYPE: dict[str, Callable[[RopeConfig], Rope]] = {
    "default": _default,
    # Within the original length, which the engine enforces, dynamic rope is the default one.
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
