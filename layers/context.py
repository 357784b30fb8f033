"""What every layer may read beside its weights and its input: static facts of the run, and the
batch.
"""

from dataclasses import dataclass

from ..pallas_kernels.registry import Ops


@dataclass(frozen=True)
class Context:
    """Static and hashable: part of the key under which a layer is traced."""

    ops: Ops
    model_axis: str | None  # the mesh axis that row-parallel layers sum over; None outside a mesh
