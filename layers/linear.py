"""Products with weight matrices, y = x W^T + b, by whatever form the weight is held in.

Weights are [out, in], as checkpoints store them. A quantization format adds a type of weight that
is a `Matrix`. What a kernel can do on the way, as the norm before a product, is an argument, so
that a format may fuse it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.norm import rms_norm
from ..pallas_kernels.reductions import argmax
from .param import Leaf


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["epsilon"])
@dataclass(frozen=True)
class Norm:
    """The RMS norm of a product's input."""

    weight: Leaf  # [in]
    epsilon: float


class Matrix(Protocol):
    """A weight [out, in]. x: f32[tokens, in]; results are f32. count: i32[], rows from there on are
    padding, whose results may be anything.
    """

    def product(
        self,
        x: jax.Array,
        bias: jax.Array | None,  # [out]
        *,
        norm: Norm | None = None,
        residual: jax.Array | None = None,  # f32[tokens, out]
        count: jax.Array | None = None,
    ) -> jax.Array:
        """residual + norm(x) W^T + bias"""

    def exact_product(
        self, x: jax.Array, bias: jax.Array | None, norm: Norm, count: jax.Array
    ) -> jax.Array:
        """The same with norm(x) kept to twice the bits of a bfloat16 weight's dtype."""

    def gated_mlp(
        self,
        x: jax.Array,
        bias: jax.Array | None,  # [out]
        norm: Norm,
        down: Any,  # a Matrix of the same type
        down_bias: jax.Array | None,
        count: jax.Array,
        model_axis: str | None,
    ) -> jax.Array:
        """f32[tokens, in]: x + (silu(gate) * up) D^T + down_bias of norm(x), where the first half
        of the rows of this matrix are gates, the rest ups.
        """

    def highest(self, x: jax.Array, count: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """i32[tokens], the lowest output of the highest value; i32[tokens], 1 if any output is not
        finite.
        """

    def rows(self, ids: jax.Array) -> jax.Array:
        """f32[ids, in]: rows of W; zeros for an id past the end."""

    @property
    def num_rows(self) -> int: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseWeight:
    """A matrix held as it is, multiplied by XLA."""

    w: Leaf  # [out, in]

    def product(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        *,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        count: jax.Array | None = None,
    ) -> jax.Array:
        y = _biased(self._dot(normed(x, norm)), bias)
        return y if residual is None else residual + y

    def exact_product(
        self, x: jax.Array, bias: jax.Array | None, norm: Norm, count: jax.Array
    ) -> jax.Array:
        x, dtype = normed(x, norm), self.w.dtype
        if dtype != jnp.bfloat16:
            return _biased(self._dot(x), bias)
        both = self._dot(high_and_rest(x, dtype))  # the weight is read once
        return _biased(both[: x.shape[0]] + both[x.shape[0] :], bias)

    def gated_mlp(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        norm: Norm,
        down: "DenseWeight",
        down_bias: jax.Array | None,
        count: jax.Array,
        model_axis: str | None,
    ) -> jax.Array:
        return linear_sum(self.gated(x, bias, norm), down, down_bias, x, count, model_axis)

    def gated(self, x: jax.Array, bias: jax.Array | None, norm: Norm) -> jax.Array:
        """f32[tokens, out / 2]: silu(gate) * up of norm(x)."""
        gate, up = jnp.split(self.product(x, bias, norm=norm), 2, axis=-1)
        return jax.nn.silu(gate) * up

    def highest(self, x: jax.Array, count: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return highest(self._dot(x))

    def rows(self, ids: jax.Array) -> jax.Array:
        return self.w.at[ids].get(mode="fill", fill_value=0).astype(jnp.float32)

    @property
    def num_rows(self) -> int:
        return int(self.w.shape[0])

    def _dot(self, x: jax.Array) -> jax.Array:
        # Accumulates in f32 whatever the weight's dtype.
        return lax.dot_general(
            x.astype(self.w.dtype),
            self.w,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )


def linear_sum(
    x: jax.Array,
    weight: Matrix,
    bias: jax.Array | None,
    residual: jax.Array,
    count: jax.Array,
    model_axis: str | None,
) -> jax.Array:
    """residual + x W^T + b, with `in` split over the model axis: one all-reduce, after which the
    rest is added once.
    """
    if model_axis is None:
        return weight.product(x, bias, residual=residual, count=count)
    return residual + _biased(lax.psum(weight.product(x, None, count=count), model_axis), bias)


def normed(x: jax.Array, norm: Norm | None) -> jax.Array:
    return x if norm is None else rms_norm(x, norm.weight, norm.epsilon)


def high_and_rest(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[2 * tokens, in] from f32[tokens, in]: x rounded to dtype, then what rounding left."""
    # Selected, not concatenated: on a GPU that is one kernel with the norm.
    is_rest = jnp.arange(2)[:, None, None] == 1
    high = x.astype(dtype).astype(jnp.float32)
    return jnp.where(is_rest, x - high, high).astype(dtype).reshape(-1, x.shape[1])


def highest(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrix.highest of the outputs y, f32[tokens, out]."""
    return argmax(y), (~jnp.isfinite(y).all(-1)).astype(jnp.int32)


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(jnp.float32)
