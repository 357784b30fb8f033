"""Weights in the form of the C++ kernels for CPUs, which fuse what stands around a product."""

from dataclasses import dataclass
from functools import partial

import jax

from ..cpu_kernels import ops
from .linear import Norm
from .param import Leaf


@partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["shape"])
@dataclass(frozen=True)
class PackedWeight:
    """A Matrix for one device; its form serves any number of rows. gated_mlp() needs a shape that
    is gated, the others one that is not.
    """

    w: Leaf  # [panels, panel]
    shape: ops.Shape

    def product(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        *,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        count: jax.Array | None = None,
    ) -> jax.Array:
        return self._call(x, bias, norm, count, residual=residual)

    def exact_product(
        self, x: jax.Array, bias: jax.Array | None, norm: Norm, count: jax.Array
    ) -> jax.Array:
        return self._call(x, bias, norm, count, is_exact=True)

    def gated_mlp(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        norm: Norm,
        down: "PackedWeight",
        down_bias: jax.Array | None,
        count: jax.Array,
        model_axis: str | None,
    ) -> jax.Array:
        assert self.shape.is_gated
        assert model_axis is None
        inner = self.shape.rows // 2
        return ops.mlp(x, norm.weight, norm.epsilon, self.w, bias, down.w, down_bias, inner, count)

    def highest(self, x: jax.Array, count: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return ops.head_argmax(x, self.w, self.shape.rows, count)

    def top(self, x: jax.Array, k: int, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """f32[tokens, k] and i32[tokens, k], the k highest outputs, falling, of equal ones the
        lowest first, and which they are; i32[tokens], 1 if any output is not finite, 0 for padding.
        """
        return ops.head_top_k(x, self.w, self.shape.rows, k, count)

    def rows(self, ids: jax.Array) -> jax.Array:
        return ops.embed(ids, self.w, self.shape.rows, self.shape.columns)

    @property
    def num_rows(self) -> int:
        return self.shape.rows

    def _call(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        norm: Norm | None,
        count: jax.Array | None,
        *,
        residual: jax.Array | None = None,
        is_exact: bool = False,
    ) -> jax.Array:
        assert not self.shape.is_gated
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.epsilon)
        return ops.linear(
            x, self.w, self.shape.rows, norm=weight, epsilon=epsilon, bias=bias,
            residual=residual, is_exact=is_exact, count=count,
        )  # fmt: skip
