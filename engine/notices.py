"""Lines for people, on stderr. What becomes of them never decides about the work."""

import os
import sys


def say(line: str) -> None:
    """Nothing is said when stderr is closed, its disk full or its reader gone."""
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        # The line stays in the buffer of a stderr that failed: Python would try it again at the
        # end, and change the exit code when it fails again.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
