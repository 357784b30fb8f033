"""Prints the table of demo/README.md: the exam, through quire itself.

`python -m quire.demo.evaluate`; with --show also what was answered wrongly.
"""

import argparse
import time
from pathlib import Path

from quire import LLM

from .exam import draw_exam, mark
from .export import ASSETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print of each skill")
    args = parser.parse_args()
    started_s = time.monotonic()
    with LLM(str(args.model)) as llm:
        print(f"engine started in {time.monotonic() - started_s:.1f} s")
        print("| Skill | Right | Asked | Cases |\n|---|---|---|---|")
        for subject in draw_exam():
            marked = mark(llm, subject)
            kind = "held out" if subject.is_held_out else "trained"
            share = f"{100 * marked.share:.1f} %"
            print(f"| {subject.name} | {share} | {marked.num_asked} | {kind} |", flush=True)
            for prompt, text in marked.wrong[: args.show]:
                print(f"    {prompt!r} -> {text!r}")
    print(f"in all {time.monotonic() - started_s:.1f} s")


if __name__ == "__main__":
    main()
