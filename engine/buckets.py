"""Which padded shapes exist: a pure function of the configuration."""

from dataclasses import dataclass
from functools import cache

from ..layers.batch import StepLayout
from ..layers.programs import SCORE_ROWS, Variant
from ..pallas_kernels.checks import QUERIES_PER_ITEM
from .errors import ConfigError

# The least of a platform. On CPU XLA's matmul with one row is 10-60x slower than with two; on a GPU
# the kernels' tiles have eight rows, and padding one up to them is a kernel before each product.
_SMALLEST = {"cpu": 2, "cuda": 8}
# Without 4: on CPU a step of 8 takes hardly longer than one of 2 (16.3 and 16.1 ms, 135M bf16), and
# a program has its price in memory and at start.
_TOKENS = (2, 8, 16, 32, 64, 256, 1024, 2048, 4096, 8192)
# With kernels that compute no padding a size costs but its program.
_TOKENS_UNPADDED = (1, 8, 32, 128, 512, 2048, 8192)
# Sizes of `sample`: fewer than those of forward, a few idle rows of the head cost little.
_ROWS = (8, 32, 64, 128, 256)
# What a step costs beside its padded tokens, in tokens: a CPU step of a 135M model takes about
# 50 ms and 0.3 ms a token (2 cores with AMX: 75 ms for 64, 130 for 256, 356 for 1024).
_STEP_COST = 160
_LEAST_GAIN = 0.25  # of one large step, to make it several

_step_layout = cache(StepLayout)  # with its parts: every step asks for one


@dataclass(frozen=True)
class Buckets:
    """The closed set of programs of an engine.

    tokens: ascending sizes of forward; rows: ascending sizes of sample; slots: device rows;
    width: pages a row's table holds; groups: KV groups; queries_per_item: of attention's work
    items; decode_tokens: sizes that have a program for steps of one-token rows alone; decode_steps:
    most steps of a program that goes on by itself.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    slots: int
    width: int
    groups: int
    is_padding_free: bool = False  # padded tokens cost next to nothing
    queries_per_item: int = QUERIES_PER_ITEM
    decode_tokens: tuple[int, ...] = ()
    decode_steps: int = 1

    def layout(self, tokens: int, *, is_decode: bool = False, num_steps: int = 1) -> StepLayout:
        """The layout of the forward program of `tokens`."""
        return _step_layout(
            tokens=tokens,
            rows=next(r for r in self.rows if r >= min(tokens, self.rows[-1])),
            groups=self.groups,
            width=self.width,
            slots=self.slots,
            queries_per_item=self.queries_per_item,
            is_decode=is_decode,
            num_steps=num_steps,
        )

    def layout_for(self, num_tokens: int, *, is_decode: bool, num_steps: int) -> StepLayout:
        """Of the smallest program for a step. is_decode: every row has one token; num_steps: more
        than one only up to decode_steps.
        """
        if num_steps > 1:
            tokens = next(t for t in self.loop_tokens if t >= num_tokens)
            return self.layout(tokens, is_decode=True, num_steps=self.decode_steps)
        tokens = self.tokens_for(num_tokens)
        return self.layout(tokens, is_decode=is_decode and tokens in self.decode_tokens)

    @property
    def loop_tokens(self) -> tuple[int, ...]:
        """Sizes of the programs of several steps: one row alone, and those of sample."""
        if self.decode_steps == 1:
            return ()
        return tuple(sorted({self.tokens[0], *self.rows}))

    def forward_layouts(self) -> list[StepLayout]:
        """Of every program of one step, ascending."""
        layouts = [self.layout(t) for t in self.tokens]
        layouts += [self.layout(t, is_decode=True) for t in self.decode_tokens]
        return sorted(layouts, key=lambda layout: (layout.tokens, layout.is_decode))

    def loop_programs(self) -> list[tuple[StepLayout, Variant]]:
        """Programs of several steps, which sample as they go."""
        layouts = [
            self.layout(t, is_decode=True, num_steps=self.decode_steps) for t in self.loop_tokens
        ]
        return [(layout, variant) for layout in layouts for variant in Variant]

    def tokens_for(self, num_tokens: int) -> int:
        """The smallest bucket that holds a step."""
        return next(t for t in self.tokens if t >= num_tokens)

    def fill(self, wanted: int) -> int:
        """How many of `wanted` tokens to compute in the next step: fewer than all when a smaller
        program, and others after it, cost much less than a large one that is mostly padding.
        """
        if wanted >= self.tokens[-1]:
            return self.tokens[-1]
        if self.is_padding_free:
            return wanted
        whole = self.tokens_for(wanted)
        below = max((t for t in self.tokens if t < wanted), default=0)
        if not below or _STEP_COST + below + _cost(self.tokens, wanted - below) > (
            1 - _LEAST_GAIN
        ) * (_STEP_COST + whole):
            return wanted
        return below

    def sample_programs(self) -> list[tuple[int, Variant]]:
        return [(rows, variant) for rows in self.rows for variant in Variant]

    def score_programs(self) -> list[tuple[int, int]]:
        """(hidden states, targets) that logprobs are taken of: sampled rows, and chunks of whole
        steps.
        """
        return sorted(
            {(r, r) for r in self.rows} | {(max(t, SCORE_ROWS), SCORE_ROWS) for t in self.tokens}
        )


@cache
def _cost(tokens: tuple[int, ...], wanted: int) -> int:
    """The least that steps of these sizes cost for so many tokens."""
    whole = _STEP_COST + next(t for t in tokens if t >= wanted)
    below = max((t for t in tokens if t < wanted), default=0)
    if not below:
        return whole
    return min(whole, _STEP_COST + below + _cost(tokens, wanted - below))


def plan_buckets(
    platform: str,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    token_buckets: tuple[int, ...] | None,
    pages_per_row: int,
    num_groups: int,
    is_padding_free: bool,
    queries_per_item: int = QUERIES_PER_ITEM,
    decode_steps: int = 1,
) -> Buckets:
    """The shapes of one engine. Raises ConfigError for token buckets that cannot serve a step.

    is_padding_free: the kernels compute no padded tokens.
    """
    smallest = 1 if is_padding_free else _SMALLEST[platform]
    if token_buckets is not None:
        tokens, least = sorted(set(token_buckets)), 1 if platform == "cuda" else smallest
        if not tokens or tokens[0] < least:
            raise ConfigError(f"token_buckets must be at least {least} on {platform}, got {tokens}")
        if tokens[-1] != max_num_batched_tokens:
            raise ConfigError(
                "the largest of token_buckets must be max_num_batched_tokens = "
                f"{max_num_batched_tokens}, got {tokens[-1]}"
            )
    else:
        sizes = _TOKENS_UNPADDED if is_padding_free else _TOKENS
        tokens = [t for t in sizes if smallest <= t < max_num_batched_tokens]
        tokens.append(max(max_num_batched_tokens, smallest))
    most_rows = max(min(max_num_seqs, max_num_batched_tokens), smallest)
    # On a GPU a kernel that has nothing to do costs its launch, in every layer.
    decode_tokens = [t for t in tokens if t <= most_rows] if platform == "cuda" else []
    return Buckets(
        tokens=tuple(tokens),
        rows=(*(r for r in _ROWS if r < most_rows), most_rows),
        slots=max_num_seqs,
        width=pages_per_row,
        groups=num_groups,
        is_padding_free=is_padding_free,
        queries_per_item=queries_per_item,
        decode_tokens=tuple(decode_tokens),
        decode_steps=decode_steps,
    )
