"""Times on a device, without the host in them; or, where there is no device, a compilation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from ...engine.xla_options import compiler_options
from .deviceless import Program, compile_program

_LEAST_SECONDS = 0.03  # of the longer of two runs
_ROUNDS = 3


@dataclass(frozen=True)
class Bench:
    """Where cases run. device None: they are compiled for `target` alone."""

    target: Any  # the device, or that of an H200 that is not there
    measured: bool

    def abstract(self, tree: Any) -> Any:
        """Shapes on the target."""
        sharding = jax.sharding.SingleDeviceSharding(self.target)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    def seconds(self, step: Callable[[Any, Any], Any], carry: Any, fixed: Any) -> "Timed":
        """Of one step(carry, fixed) -> carry, among many back to back in one program.

        Arrays are jax.ShapeDtypeStructs or real ones; where nothing is measured only their shapes
        count.
        """

        def repeat(carry: Any, fixed: Any, count: jax.Array) -> Any:
            return lax.fori_loop(0, count, lambda _, c: step(c, fixed), carry)

        arguments = self.abstract((carry, fixed, jax.ShapeDtypeStruct((), "int32")))
        lowered = jax.jit(repeat, donate_argnums=0).lower(*arguments)
        if not self.measured:
            options = compiler_options(self.target.platform)
            return Timed(None, compile_program(lowered, options))
        options = compiler_options(self.target.platform)
        run = lowered.compile(compiler_options=options)

        def spent(carry: Any, count: int) -> tuple[float, Any]:
            began = time.perf_counter()
            carry = jax.block_until_ready(run(carry, fixed, count))
            return time.perf_counter() - began, carry

        _, carry = spent(carry, 2)
        few, many = 2, 12
        while True:
            took, carry = spent(carry, many)
            if took > _LEAST_SECONDS or many > 20_000:
                break
            many *= 4
        short, long = [], []
        for _ in range(_ROUNDS):
            for count, times in ((few, short), (many, long)):
                took, carry = spent(carry, count)
                times.append(took)
        return Timed(per_step(short, long, many - few), None)


def per_step(short: list[float], long: list[float], steps: int) -> float:
    """Seconds of each of the steps by which the long runs are longer. The shortest of either are
    compared, not the runs of one round: a short run that was disturbed would make the steps quick.
    """
    return (min(long) - min(short)) / steps


@dataclass(frozen=True)
class Timed:
    """seconds: None where nothing was measured; then program is what was compiled."""

    seconds: float | None
    program: Program | None

    def rate(self, amount: float) -> float | None:
        """amount a second."""
        return None if self.seconds is None else amount / self.seconds

    def facts(self) -> dict[str, Any]:
        """What a dry run can say."""
        if self.program is None:
            return {}
        return {"kernels": len(self.program.kernels), "temp_bytes": self.program.temp_bytes}
