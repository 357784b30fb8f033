"""The C library's allocator, set for processes that many short requests go through."""

import ctypes
from typing import Any

_M_ARENA_MAX = -8


def use_one_arena() -> None:
    """Call it before there are threads. By default each thread of gRPC's soon has an arena of its
    own, whose free memory the others do not use: the process grows with the load it has seen.
    """
    _call("mallopt", _M_ARENA_MAX, 1)


def give_back() -> None:
    """What is free, to the machine."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    """Of glibc; other libraries do without."""
    function: Any = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*args)
