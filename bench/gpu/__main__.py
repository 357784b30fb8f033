"""Everything that is worth measuring on a GPU, in one go: one JSON file and one log.

python -m quire.bench.gpu [--out FOLDER] [--minutes 9] [--dry-run]

Needs jax, flax, numpy, transformers, tokenizers and safetensors, and no installed quire: a folder
with a link named quire to the checkout, on PYTHONPATH, is enough. --dry-run compiles every case for
an H200 without a device and writes the same table with "measured": false.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

_MOST_MINUTES = 9.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--minutes", type=float, default=_MOST_MINUTES)
    parser.add_argument("--sizes", default="1b,8b", help="of bench/shapes")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if options.dry_run:
        return _dry_run(options.out, sizes, options.minutes)
    return _measure(options.out, sizes, options.minutes)


def _dry_run(out: Path, sizes: list[str], minutes: float) -> int:
    from . import deviceless

    deviceless.prepare()
    from . import attention, ceilings, products, steps
    from .results import Results
    from .timing import Bench

    [device] = deviceless.h200_devices(1)
    name = f"{device.device_kind}, not there: compiled only"
    results = Results(out, device=name, measured=False, seconds=60 * minutes)
    bench = Bench(device, measured=False)
    limits = ceilings.measure(bench, results)
    attention.measure(bench, results, limits)
    products.measure(bench, results, limits)
    for size in sizes:
        setup = steps.Setup(size, [device], 120 << 30, measured=False)
        results.section(size, partial(steps.compile_only, setup, results))
    results.write()
    return 1 if results.num_failed else 0


def _measure(out: Path, sizes: list[str], minutes: float) -> int:
    from ...engine import gpu_memory

    reserved = gpu_memory.reserve(0.9, 1)
    import jax

    from . import attention, ceilings, correctness, products, steps
    from .results import Results
    from .timing import Bench

    if jax.default_backend() == "cpu":
        print("there is no GPU here; --dry-run compiles for one", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    results = Results(out, device=device.device_kind, measured=True, seconds=60 * minutes)
    for line in reserved:
        results.say(line)
    bench = Bench(device, measured=True)
    correctness.check(results)
    found: list[ceilings.Ceilings] = []
    results.section("ceilings", lambda: found.append(ceilings.measure(bench, results)))
    limits = found[0] if found else ceilings.PAPER
    attention.measure(bench, results, limits)
    products.measure(bench, results, limits)
    for size in sizes:
        setup = steps.Setup(size, [device], gpu_memory.pool_bytes(), measured=True)
        model = steps.Model(setup)
        results.section(f"{size} start", partial(model.start, results))
        steps.decode_steps(model, results, limits)
        for part in (steps.several_steps, steps.without_graphs, steps.host_time):
            results.section(f"{size} {part.__name__}", partial(part, model, results))
        steps.prompts(model, results)
        steps.throughput(model, results)
        model.runner.release()
    results.write()
    return 1 if results.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
