"""Products of few tokens with a weight matrix on Hopper GPUs: what the kernel serves, and the tiles
it cuts a matrix into.

The kernel itself (linear_gpu_kernel.py) is Pallas Mosaic GPU, whose import takes a second: only who
runs it pays that. It knows nothing of layers, norms and meshes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .checks import LinearSpec, check_linear
from .tuning import Sizes, stages_that_fit

DTYPES = (jnp.bfloat16, jnp.float16)
TOKEN_STEP = 8  # tokens are padded to a multiple: rows of a swizzled tile in shared memory
ROW_STEP = 16  # so that every transfer is a multiple of 128 bytes
_INPUT_STEP = 64  # columns in 128 bytes, the width of such a tile
_LEFT_ROWS = 64  # of one wgmma: tokens are its left operand
_MOST_OUTPUTS = 256  # of one wgmma
_MOST_SUMS = 128  # registers of a thread for sums, half of what it has
_THREADS = 128


@dataclass(frozen=True)
class Problem:
    """One product, its tokens padded."""

    tokens: int
    inputs: int
    outputs: int  # rows of W
    spec: LinearSpec
    has_bias: bool = False
    has_residual: bool = False

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outputs // 2 if self.spec.is_gated else self.outputs

    @property
    def x_rows(self) -> int:
        return self.tokens * 2 if self.spec.is_exact else self.tokens

    @property
    def left_rows(self) -> int:
        """Of the left operand in shared memory; those past x_rows hold anything."""
        return _round_up(self.x_rows, _LEFT_ROWS)

    @property
    def result_rows(self) -> int:
        """Of a tile of the result in shared memory."""
        return self.left_rows + (self.tokens if self.spec.is_exact else 0)


@dataclass(frozen=True)
class Tiling:
    """How W is cut: into whole tiles, of which block b multiplies b, b + blocks, ...

    is_paired: each two blocks are a cluster, and a row of x is read once for both.
    """

    rows: int  # columns of the result in a tile; gated: so many gates and so many ups
    columns: int  # of W in a stage
    stages: int  # in shared memory
    tiles: int
    blocks: int
    is_paired: bool


@dataclass(frozen=True)
class Kernel:
    """The implementation for one device. is_interpreted: run on CPU, for tests."""

    sizes: Sizes
    is_interpreted: bool = False

    def serves(self, tokens: int, w: jax.Array, spec: LinearSpec) -> bool:
        """Few tokens, 16-bit weights, and whole tiles. w: [out, in]."""
        outputs, inputs = w.shape
        if not 1 <= tokens <= self.sizes.linear.most_tokens or w.dtype not in DTYPES:
            return False
        problem = Problem(_round_up(tokens, TOKEN_STEP), inputs, outputs, spec)
        is_whole = inputs % _INPUT_STEP == 0 and problem.width % ROW_STEP == 0
        return is_whole and choose_tiling(problem, self.sizes) is not None

    def run(
        self,
        x: jax.Array,  # [tokens, in]; exact: [2 * tokens, in], high parts first
        w: jax.Array,  # [out, in]
        bias: jax.Array | None,  # [out]
        residual: jax.Array | None,  # f32[tokens, out]
        spec: LinearSpec,
    ) -> jax.Array:
        """Same meaning as reference.linear. A row's bits depend on nothing but the row."""
        from .linear_gpu_kernel import build

        check_linear(x, w, bias, residual, spec)
        inputs = x.shape[1]
        parts = x.reshape(2 if spec.is_exact else 1, -1, inputs)
        tokens = parts.shape[1]
        padded = _round_up(tokens, TOKEN_STEP)
        parts = jnp.pad(parts, ((0, 0), (0, padded - tokens), (0, 0)))
        if residual is not None:
            residual = jnp.pad(residual, ((0, padded - tokens), (0, 0)))
        has = {"has_bias": bias is not None, "has_residual": residual is not None}
        problem = Problem(padded, inputs, w.shape[0], spec, **has)
        tiling = choose_tiling(problem, self.sizes)
        assert tiling is not None, "serves() says no"
        kernel = build(problem, tiling, self, w.dtype)
        rest = [array for array in (bias, residual) if array is not None]
        y: jax.Array = kernel(parts.reshape(-1, inputs), w, *rest)
        return y[:tokens]


def choose_tiling(problem: Problem, sizes: Sizes) -> Tiling | None:
    """The tiles of least cost, the largest among equals; None if none fits."""
    matrices = 2 if problem.spec.is_gated else 1
    sums = problem.left_rows * matrices  # times rows, of a block
    most = min(_MOST_OUTPUTS // matrices, _MOST_SUMS * _THREADS // sums, problem.width)

    def cost(tiling: Tiling) -> float:
        readers = 2 if tiling.is_paired else 1
        work = tiling.rows * matrices + sizes.linear.token_cost * problem.x_rows / readers
        return -(-tiling.tiles // tiling.blocks) * work

    sizes_of_tiles = [r for r in range(ROW_STEP, most + 1, ROW_STEP) if problem.width % r == 0]
    fitting = [_tiling(problem, sizes, rows) for rows in reversed(sizes_of_tiles)]
    return min((t for t in fitting if t is not None), key=cost, default=None)


def _tiling(problem: Problem, sizes: Sizes, rows: int) -> Tiling | None:
    """With tiles of so many rows and the widest stages of which enough fit."""
    tiles = problem.width // rows
    matrices, itemsize = (2, 2) if problem.spec.is_gated else (1, 4)
    result_bytes = problem.result_rows * rows * itemsize
    for columns in (sizes.linear.columns, _INPUT_STEP):
        stage_bytes = (problem.left_rows + matrices * rows) * columns * 2
        stages = stages_that_fit(sizes, stage_bytes, result_bytes, sizes.linear.most_stages)
        if problem.inputs % columns == 0 and stages >= sizes.linear.least_stages:
            blocks = min(tiles, sizes.num_sms)
            # Each block of a pair loads half of the rows, and both have the same way to go.
            halves = problem.x_rows % (2 * TOKEN_STEP) == tiles % 2 == blocks % 2 == 0
            is_paired = halves and problem.x_rows >= sizes.linear.pair_x_rows
            return Tiling(rows, columns, stages, tiles, blocks, is_paired)
    return None


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
