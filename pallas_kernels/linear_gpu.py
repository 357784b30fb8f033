"""Products of few tokens with a weight matrix on Hopper GPUs: what the kernel serves, and the tiles
it cuts a matrix into.

The kernel itself (linear_gpu_kernel.py) is Pallas Mosaic GPU, whose import takes a second: only who
runs it pays that. It knows nothing of layers, norms and meshes.
"""

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources

import jax
import jax.numpy as jnp

from .checks import LinearSpec, check_linear

DTYPES = (jnp.bfloat16, jnp.float16)
TOKEN_STEP = 8  # tokens are padded to a multiple: rows of a swizzled tile in shared memory
ROW_STEP = 16  # so that every transfer is a multiple of 128 bytes
_INPUT_STEP = 64  # columns in 128 bytes, the width of such a tile
_LEFT_ROWS = 64  # of one wgmma: tokens are its left operand
_MOST_OUTPUTS = 256  # of one wgmma
_MOST_SUMS = 128  # registers of a thread for sums, half of what it has
_THREADS = 128
# What barriers and the alignment of each array take at most.
_RESERVED_BYTES = 4096


@dataclass(frozen=True)
class LinearSizes:
    """Of the kernel on one device. measured: whether a run on the device stands behind them.

    columns: of a stage, or 64; least_stages: with fewer a tile is not taken; token_cost: what a row
    of x costs a tile, in rows of W (x comes from the L2 cache, W from memory); pair_x_rows: from so
    many rows of x on, two blocks read them together; overlaps_launch: weights are asked for before
    the kernel in front has ended.
    """

    device: str
    measured: bool
    num_sms: int
    shared_memory_bytes: int  # that one block may use
    most_tokens: int
    columns: int
    least_stages: int
    most_stages: int
    token_cost: float
    pair_x_rows: int
    overlaps_launch: bool


@cache
def load_sizes(name: str) -> LinearSizes:
    """tuned/linear_<name>.json; its `why` is for its reader."""
    text = (resources.files(__package__) / "tuned" / f"linear_{name}.json").read_text("utf-8")
    values = json.loads(text)
    return LinearSizes(**{field.name: values[field.name] for field in fields(LinearSizes)})


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

    sizes: LinearSizes
    is_interpreted: bool = False

    def serves(self, tokens: int, w: jax.Array, spec: LinearSpec) -> bool:
        """Few tokens, 16-bit weights, and whole tiles. w: [out, in]."""
        outputs, inputs = w.shape
        if not 1 <= tokens <= self.sizes.most_tokens or w.dtype not in DTYPES:
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


def choose_tiling(problem: Problem, sizes: LinearSizes) -> Tiling | None:
    """The tiles of least cost, the largest among equals; None if none fits."""
    matrices = 2 if problem.spec.is_gated else 1
    sums = problem.left_rows * matrices  # times rows, of a block
    most = min(_MOST_OUTPUTS // matrices, _MOST_SUMS * _THREADS // sums, problem.width)

    def cost(tiling: Tiling) -> float:
        readers = 2 if tiling.is_paired else 1
        work = tiling.rows * matrices + sizes.token_cost * problem.x_rows / readers
        return -(-tiling.tiles // tiling.blocks) * work

    sizes_of_tiles = [r for r in range(ROW_STEP, most + 1, ROW_STEP) if problem.width % r == 0]
    fitting = [_tiling(problem, sizes, rows) for rows in reversed(sizes_of_tiles)]
    return min((t for t in fitting if t is not None), key=cost, default=None)


def _tiling(problem: Problem, sizes: LinearSizes, rows: int) -> Tiling | None:
    """With tiles of so many rows and the widest stages of which enough fit."""
    tiles = problem.width // rows
    matrices, itemsize = (2, 2) if problem.spec.is_gated else (1, 4)
    room = sizes.shared_memory_bytes - _RESERVED_BYTES - problem.result_rows * rows * itemsize
    for columns in (sizes.columns, _INPUT_STEP):
        stage_bytes = (problem.left_rows + matrices * rows) * columns * 2
        stages = min(room // stage_bytes, sizes.most_stages)
        if problem.inputs % columns == 0 and stages >= sizes.least_stages:
            blocks = min(tiles, sizes.num_sms)
            # Each block of a pair loads half of the rows, and both have the same way to go.
            halves = problem.x_rows % (2 * TOKEN_STEP) == tiles % 2 == blocks % 2 == 0
            is_paired = halves and problem.x_rows >= sizes.pair_x_rows
            return Tiling(rows, columns, stages, tiles, blocks, is_paired)
    return None


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
