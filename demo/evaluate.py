"""Measures each skill on cases that training never saw, through quire itself.

`python -m quire.demo.evaluate` prints a table for demo/README.md. A skill without held-out cases
(fixed replies) is measured on what it was trained on, and says so.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from quire import LLM, SamplingParams

from .corpus import draw_held_out, draw_trained
from .skills import SKILLS, Exchange, Skill
from .train import ASSETS

MAX_TOKENS = 256  # of an answer; the longest story has about 180


@dataclass(frozen=True)
class Score:
    skill: str
    num_right: int
    num_asked: int
    is_held_out: bool
    wrong: tuple[tuple[str, str], ...]  # prompts and what was answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--cases", type=int, default=200, help="of each skill, repeats dropped")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print of each skill")
    args = parser.parse_args()
    started_s = time.monotonic()
    with LLM(str(args.model)) as llm:
        print(f"engine started in {time.monotonic() - started_s:.1f} s")
        print("| skill | right | asked | cases |\n|---|---|---|---|")
        for skill in SKILLS:
            score = measure(llm, skill, args.cases)
            kind = "held out" if score.is_held_out else "trained"
            share = f"{100 * score.num_right / score.num_asked:.1f} %"
            print(f"| {skill.name} | {share} | {score.num_asked} | {kind} |", flush=True)
            for prompt, text in score.wrong[: args.show]:
                print(f"    {prompt!r} -> {text!r}")
    print(f"in all {time.monotonic() - started_s:.1f} s")


def measure(llm: LLM, skill: Skill, num_cases: int) -> Score:
    """Greedy answers to single-turn questions, each asked once."""
    exchanges, is_held_out = draw_exam(skill, num_cases)
    outputs = llm.chat(
        [[{"role": "user", "content": exchange.prompt}] for exchange in exchanges],
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        use_tqdm=False,
    )
    texts = [output.outputs[0].text for output in outputs]
    wrong = [
        (exchange.prompt, text)
        for exchange, text in zip(exchanges, texts, strict=True)
        if not skill.is_right(exchange, text)
    ]
    num_asked = len(exchanges)
    return Score(skill.name, num_asked - len(wrong), num_asked, is_held_out, tuple(wrong))


def draw_exam(skill: Skill, num_cases: int) -> tuple[list[Exchange], bool]:
    """Different prompts, at most num_cases; held out where the skill holds any out."""
    rng = Random(f"exam {skill.name}")
    is_held_out = draw_held_out(skill, rng) is not None
    exchange_by_prompt: dict[str, Exchange] = {}
    # A small skill has fewer prompts than are asked for: stop looking after a while.
    for _ in range(10 * num_cases):
        if len(exchange_by_prompt) == num_cases:
            break
        drawn = draw_held_out(skill, rng) if is_held_out else draw_trained(skill, rng)
        if drawn is not None:
            exchange_by_prompt.setdefault(drawn.prompt, drawn)
    return list(exchange_by_prompt.values()), is_held_out


if __name__ == "__main__":
    main()
