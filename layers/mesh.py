"""The device mesh and the one table from a weight's logical axes to mesh axes."""

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

DATA, MODEL = "data", "model"

MESH_AXIS_BY_LOGICAL: dict[str | None, str | None] = {
    None: None,
    "hidden": None,
    "vocab": MODEL,
    "heads": MODEL,
    "mlp": MODEL,
}


def make_mesh(tensor_parallel_size: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "model") of shape [1, tensor_parallel_size] over the first devices."""
    devices = jax.devices() if devices is None else devices
    grid = np.array(devices[:tensor_parallel_size]).reshape(1, tensor_parallel_size)
    return Mesh(grid, (DATA, MODEL))


def partition(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partitioning of an array with these logical axes. Raises KeyError for an unknown axis."""
    return PartitionSpec(*(MESH_AXIS_BY_LOGICAL[axis] for axis in axes))
