"""Weights that a GPU kernel multiplies with few tokens, and XLA with many."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ..pallas_kernels.checks import LinearSpec
from ..pallas_kernels.linear_gpu import Kernel
from .linear import DenseWeight, Norm, high_and_rest, highest, linear_sum, normed
from .param import Leaf


@partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["kernel"])
@dataclass(frozen=True)
class GpuWeight:
    """A Matrix held as it is. Which way it is multiplied follows from the number of tokens, when a
    program is traced.
    """

    w: Leaf  # [out, in]
    kernel: Kernel

    def product(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        *,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        count: jax.Array | None = None,
    ) -> jax.Array:
        if not self._serves(x, LinearSpec()):
            return self._dense.product(x, bias, norm=norm, residual=residual)
        return self._run(normed(x, norm).astype(self.w.dtype), bias, residual, LinearSpec())

    def exact_product(
        self, x: jax.Array, bias: jax.Array | None, norm: Norm, count: jax.Array
    ) -> jax.Array:
        if self.w.dtype != jnp.bfloat16:
            return self.product(x, bias, norm=norm)
        spec = LinearSpec(is_exact=True)
        if not self._serves(x, spec):
            return self._dense.exact_product(x, bias, norm, count)
        return self._run(high_and_rest(normed(x, norm), self.w.dtype), bias, None, spec)

    def gated_mlp(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        norm: Norm,
        down: "GpuWeight",
        down_bias: jax.Array | None,
        count: jax.Array,
        model_axis: str | None,
    ) -> jax.Array:
        spec = LinearSpec(is_gated=True)
        if self._serves(x, spec):
            inner = self._run(normed(x, norm).astype(self.w.dtype), bias, None, spec)
        else:
            inner = self._dense.gated(x, bias, norm)
        return linear_sum(inner, down, down_bias, x, count, model_axis)

    def highest(self, x: jax.Array, count: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return highest(self.product(x, None))

    def rows(self, ids: jax.Array) -> jax.Array:
        return self._dense.rows(ids)

    @property
    def num_rows(self) -> int:
        return self._dense.num_rows

    @property
    def _dense(self) -> DenseWeight:
        return DenseWeight(self.w)

    def _serves(self, x: jax.Array, spec: LinearSpec) -> bool:
        return self.kernel.serves(x.shape[0], self.w, spec)

    def _run(
        self,
        x: jax.Array,  # [tokens, in], in W's dtype; exact: [2 * tokens, in]
        bias: jax.Array | None,  # [out]
        residual: jax.Array | None,  # f32[tokens, out]
        spec: LinearSpec,
    ) -> jax.Array:
        return self.kernel.run(x, self.w, bias, residual, spec)
