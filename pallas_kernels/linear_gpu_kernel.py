"""The kernel of linear_gpu.py: y = x W^T for few tokens, as fast as W can be read (Pallas Mosaic
GPU, Hopper).

A block walks over its tiles of W with a ring of stages in shared memory: one warpgroup multiplies a
stage (wgmma) and asks for the one that will take its place (TMA). A tile is all columns of some
rows of W, so that no sum is split between blocks: a number is added up from the first column to
the last, in one accumulator, whatever the tiles and the other tokens are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .linear_gpu import Kernel, Problem, Tiling

# What wgmma reads: 8 rows of 128 bytes, swizzled.
_OPERAND: Any = (
    plgpu.TilingTransform((8, 64)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(128),  # type: ignore[abstract]
)
_PAIR = 2  # blocks of a cluster
_UNUSED = {"stage_free": None, "residual_ready": None}


class Refs(NamedTuple):
    """Global memory, shared memory, and the barriers of its stages."""

    x: Any  # [x_rows, in]
    w: Any  # [out, in]
    bias: Any  # [out]
    residual: Any  # f32[tokens, out]
    y: Any  # [tokens, width]
    x_stages: Any  # [stages, left_rows, columns]
    w_stages: Any  # [stages, rows, columns]; gated: twice the rows
    result: Any  # [result_rows, rows]
    stage_ready: Any
    stage_free: Any  # in both blocks of a pair
    residual_ready: Any


def build(problem: Problem, tiling: Tiling, kernel: Kernel, dtype: Any) -> Callable[..., jax.Array]:
    """A function of x, w and, where there are any, bias and residual."""
    spec = problem.spec
    made = dtype if spec.is_gated else jnp.float32
    walk = _Walk(problem, tiling, kernel.sizes.linear.overlaps_launch and not kernel.is_interpreted)

    def linear(*arrays: Any, **scratch: Any) -> None:
        x, w, *rest, y = arrays
        bias = rest.pop(0) if problem.has_bias else None
        residual = rest.pop(0) if problem.has_residual else None
        walk.run(Refs(x, w, bias, residual, y, **_UNUSED | scratch))

    w_rows = tiling.rows * (2 if spec.is_gated else 1)
    scratch: dict[str, Any] = {
        "x_stages": plgpu.SMEM(
            (tiling.stages, problem.left_rows, tiling.columns), dtype, transforms=_OPERAND
        ),
        "w_stages": plgpu.SMEM((tiling.stages, w_rows, tiling.columns), dtype, transforms=_OPERAND),
        "result": plgpu.SMEM((problem.result_rows, tiling.rows), made),
        "stage_ready": plgpu.Barrier(
            num_arrivals=3 if spec.is_gated else 2, num_barriers=tiling.stages
        ),
    }
    if problem.has_residual:
        scratch["residual_ready"] = plgpu.Barrier()
    paired: dict[str, Any] = {}
    if tiling.is_paired:
        paired = {"cluster": (_PAIR,), "cluster_names": ("half",)}
        scratch["stage_free"] = plgpu.ClusterBarrier(
            collective_axes=("half",), num_barriers=tiling.stages
        )
    interpret = plgpu.InterpretGPUParams(detect_races=True) if kernel.is_interpreted else None
    call: Callable[..., jax.Array] = plgpu.kernel(
        linear,
        out_type=jax.ShapeDtypeStruct((problem.tokens, problem.width), made),
        grid=(tiling.blocks // (_PAIR if tiling.is_paired else 1),),
        grid_names=("block",),
        **paired,
        scratch_types=scratch,
        interpret=interpret,
    )
    return call


@dataclass(frozen=True)
class _Walk:
    """One block's way over its tiles. Steps are counted over all of them: step = tile of the block
    times steps_per_tile + stage of columns.
    """

    problem: Problem
    tiling: Tiling
    overlaps_launch: bool

    @property
    def steps_per_tile(self) -> int:
        return self.problem.inputs // self.tiling.columns

    def run(self, refs: Refs) -> None:
        tiling = self.tiling
        own_tiles = lax.div(
            tiling.tiles - self._block() + (tiling.blocks - 1), jnp.int32(tiling.blocks)
        )
        last = own_tiles * self.steps_per_tile
        # Weights do not wait for who writes x: another kernel may still be at it.
        self._fill(partial(self._fetch_w, refs), last)
        if self.overlaps_launch:
            plgpu.griddepcontrol_wait()
        self._fill(partial(self._fetch_x, refs), last)

        lax.fori_loop(0, own_tiles, lambda index, _: self._tile(refs, index, last), None)
        plgpu.wait_smem_to_gmem(0)

    def _fill(self, fetch: Callable[[jax.Array], None], last: jax.Array) -> None:
        for step in range(self.tiling.stages):
            pl.when(step < last)(partial(fetch, jnp.int32(step)))

    def _block(self) -> jax.Array:
        block = lax.axis_index("block")
        return block * _PAIR + lax.axis_index("half") if self.tiling.is_paired else block

    def _first_row(self, index: jax.Array) -> jax.Array:
        """Of the block's tile `index`."""
        return (self._block() + index * self.tiling.blocks) * self.tiling.rows

    def _slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.tiling.stages))

    def _columns(self, step: jax.Array) -> Any:
        part = lax.rem(step, jnp.int32(self.steps_per_tile))
        return pl.ds(part * self.tiling.columns, self.tiling.columns)

    def _fetch_w(self, refs: Refs, step: jax.Array) -> None:
        slot, rows = self._slot(step), self.tiling.rows
        first = self._first_row(lax.div(step, jnp.int32(self.steps_per_tile)))
        for i in range(2 if self.problem.spec.is_gated else 1):
            plgpu.copy_gmem_to_smem(
                refs.w.at[pl.ds(first + i * self.problem.width, rows), self._columns(step)],
                refs.w_stages.at[slot, pl.ds(i * rows, rows)],
                refs.stage_ready.at[slot],
            )

    def _fetch_x(self, refs: Refs, step: jax.Array) -> None:
        slot = self._slot(step)
        plgpu.copy_gmem_to_smem(
            refs.x.at[:, self._columns(step)],
            refs.x_stages.at[slot, pl.ds(0, self.problem.x_rows)],
            refs.stage_ready.at[slot],
            collective_axes="half" if self.tiling.is_paired else None,
        )

    def _tile(self, refs: Refs, index: jax.Array, last: jax.Array) -> None:
        tokens = pl.ds(0, self.problem.tokens)
        columns = pl.ds(self._first_row(index), self.tiling.rows)
        # The result of the tile before must have left its place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if self.problem.has_residual:
            plgpu.copy_gmem_to_smem(
                refs.residual.at[:, columns], refs.result.at[tokens], refs.residual_ready
            )
        sums = pl.run_scoped(
            partial(self._multiply, refs, index, last),
            plgpu.ACC((self.problem.left_rows, refs.w_stages.shape[1]), jnp.float32),
        )
        refs.result[pl.ds(0, self.problem.left_rows)] = self._finish(refs, sums, columns)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.result.at[tokens], refs.y.at[:, columns])

    def _multiply(self, refs: Refs, index: jax.Array, last: jax.Array, sums: Any) -> jax.Array:
        """f32[left_rows, rows], gated: [left_rows, 2 * rows]: x times the tile."""

        def multiply(part: jax.Array, _: None) -> None:
            step = index * self.steps_per_tile + part
            slot = self._slot(step)
            plgpu.barrier_wait(refs.stage_ready.at[slot])
            plgpu.wgmma(sums, refs.x_stages.at[slot], refs.w_stages.at[slot].T)
            # The product before this one has been made: its stage is free.
            plgpu.wgmma_wait(1)
            self._refill(refs, step, last)

        lax.fori_loop(0, self.steps_per_tile, multiply, None)
        made: jax.Array = sums[...]
        return made

    def _refill(self, refs: Refs, step: jax.Array, last: jax.Array) -> None:
        """Ask for what takes the place of the step before this one."""
        following = step + (self.tiling.stages - 1)

        @pl.when((step > 0) & (following < last))
        def refill() -> None:
            self._fetch_w(refs, following)
            if self.tiling.is_paired:
                # After a copy, which begins when all warps have come: the arrival is of one only.
                plgpu.barrier_arrive(refs.stage_free.at[self._slot(following)])
            else:
                self._fetch_x(refs, following)

        if self.tiling.is_paired:
            # A step later, so that the blocks need not wait for each other.
            delayed = following - 1

            @pl.when((step > 1) & (delayed < last))
            def refill_x() -> None:
                plgpu.barrier_wait(refs.stage_free.at[self._slot(delayed)])
                self._fetch_x(refs, delayed)

    def _finish(self, refs: Refs, sums: jax.Array, columns: Any) -> jax.Array:
        """[left_rows, rows]: what is stored of a tile; rows from `tokens` on may hold anything."""
        problem, rows = self.problem, self.tiling.rows
        spec, left_rows = problem.spec, problem.left_rows
        if spec.is_exact:
            # The sums of the rests are `tokens` rows below those of the high parts.
            refs.result[pl.ds(0, left_rows)] = sums
            sums = sums + refs.result[pl.ds(problem.tokens, left_rows)]
        if spec.is_gated:
            gates = self._biased(refs, sums[:, :rows], columns)
            ups = pl.ds(columns.start + problem.width, rows)
            sums = gates / (1 + jnp.exp(-gates)) * self._biased(refs, sums[:, rows:], ups)
            return sums.astype(refs.result.dtype)
        sums = self._biased(refs, sums, columns)
        if problem.has_residual:
            plgpu.barrier_wait(refs.residual_ready)
            sums = sums + refs.result[pl.ds(0, left_rows)]
        return sums

    def _biased(self, refs: Refs, sums: jax.Array, rows: Any) -> jax.Array:
        if refs.bias is None:
            return sums
        # Not in whole sectors of memory, which the other way of loading insists on.
        bias = plgpu.load(refs.bias.at[rows], optimized=False)
        return sums + lax.broadcast_in_dim(bias.astype(jnp.float32), sums.shape, [1])
