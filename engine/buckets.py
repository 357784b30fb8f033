"""Which padded shapes exist: a pure function of the configuration."""

from dataclasses import dataclass

from ..layers.batch import StepLayout
from ..layers.programs import Variant
from .errors import ConfigError

_CPU_TOKENS = (2, 4, 8, 16, 32, 64, 256, 1024)
_GPU_TOKENS = (1, *_CPU_TOKENS, 2048, 4096, 8192)


@dataclass(frozen=True)
class Buckets:
    """The closed set of programs of an engine.

    tokens: ascending sizes of forward; rows: ascending sizes of sample; slots: device rows; width: pages a row's
    table holds; groups: KV groups.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    slots: int
    width: int
    groups: int

    def layout(self, tokens: int) -> StepLayout:
        """The layout of the forward program of `tokens`."""
        return StepLayout(
            tokens=tokens,
            rows=min(tokens, self.rows[-1]),
            groups=self.groups,
            width=self.width,
            slots=self.slots,
        )

    def tokens_for(self, num_tokens: int) -> int:
        """The smallest bucket that holds a step."""
        return next(t for t in self.tokens if t >= num_tokens)

    def sample_programs(self) -> list[tuple[int, Variant]]:
        return [(rows, variant) for rows in self.rows for variant in Variant]


def plan_buckets(
    platform: str,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    token_buckets: tuple[int, ...] | None,
    pages_per_row: int,
    num_groups: int,
) -> Buckets:
    """The shapes for one engine. Raises ConfigError when given token buckets cannot serve a step."""
    # A matmul with one row is 10-60x slower than with two on CPU.
    smallest = 2 if platform == "cpu" else 1
    if token_buckets is not None:
        tokens = sorted(set(token_buckets))
        if not tokens or tokens[0] < smallest:
            raise ConfigError(f"token_buckets must be at least {smallest} on {platform}, got {tokens}")
        if tokens[-1] != max_num_batched_tokens:
            raise ConfigError(
                f"the largest of token_buckets must be max_num_batched_tokens = {max_num_batched_tokens}, "
                f"got {tokens[-1]}"
            )
    else:
        table = _CPU_TOKENS if platform == "cpu" else _GPU_TOKENS
        tokens = [t for t in table if smallest <= t < max_num_batched_tokens]
        tokens.append(max(max_num_batched_tokens, smallest))
    most_rows = max(max_num_seqs, smallest)
    return Buckets(
        tokens=tuple(tokens),
        rows=tuple(sorted({min(t, most_rows) for t in tokens})),
        slots=max_num_seqs,
        width=pages_per_row,
        groups=num_groups,
    )
