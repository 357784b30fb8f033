"""Start one engine and print what it took: a process of its own for `quire bench startup`."""

import json
import sys
import time


def main() -> int:
    """The exit code; options are the first argument, as JSON."""
    started = time.perf_counter()
    from ...engine.config import EngineConfig
    from ...engine.errors import UsageError
    from ...engine.startup import start_engine

    try:
        engine = start_engine(EngineConfig(**json.loads(sys.argv[1])), lambda _: None)
    except UsageError as error:
        print(f"quire: {error}", file=sys.stderr)
        return 2
    report = engine.compiling
    print(
        json.dumps(
            {
                "startup": time.perf_counter() - started,
                "compilation": report.total_s,
                "loaded": report.loaded,
                "compiled": report.compiled,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
