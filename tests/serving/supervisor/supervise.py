"""A supervisor as a process of its own; its one argument says what it supervises.

{"engine": …, "gateway": options of a fake child, "limits": …} is what `quire engine` does;
{"children": {name: options of a fake child}, "limits": …} is a supervisor of fake children alone.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from quire.engine.errors import ConfigError
from quire.serving.supervisor.child import Child
from quire.serving.supervisor.command import Front, run_engine
from quire.serving.supervisor.display import Display
from quire.serving.supervisor.supervisor import Limits, Supervisor

FAKE = (sys.executable, str(Path(__file__).parent / "fake_child.py"))


async def of_fakes(children: dict[str, Any], limits: Limits) -> int:
    async def never_answers() -> str:
        raise TimeoutError

    async def is_stuck() -> str:
        return "it stands still"

    questions = {"unanswered": never_answers, "stuck": is_stuck}
    made = [
        Child(
            name,
            FAKE,
            options,
            drains=name == "gateway",
            why_stuck=questions.get(options.get("question")),
        )
        for name, options in children.items()
    ]
    display = Display()
    try:
        return await Supervisor(made, limits, display).run()
    finally:
        display.close()


def main() -> int:
    given = json.loads(sys.argv[1])
    limits = Limits(**given.get("limits", {}))
    if "children" in given:
        return asyncio.run(of_fakes(given["children"], limits))
    fronts = [Front("gateway", FAKE, given["gateway"])] if "gateway" in given else []
    try:
        return run_engine(given["engine"], fronts, limits)
    except ConfigError as error:
        print(f"quire: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
