"""What the measurements share: random prompts, percentiles, the JSON file."""

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from ...engine.errors import ConfigError, EngineError
from ...engine.llm import LLM
from ...engine.outputs import RequestOutput
from ...engine.sampling_params import SamplingParams

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def random_prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Prompts of random token ids, the same in every run."""
    # A tokenizer may have more tokens than the model reads.
    rng, vocab_size = Random(0), min(llm.get_tokenizer().vocab_size, llm.logits_width)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def whole_length_params(output_len: int, n: int, *, detokenize: bool) -> SamplingParams:
    """Sampled answers that end at their full length."""
    return SamplingParams(
        temperature=1.0, n=n, max_tokens=output_len, ignore_eos=True, detokenize=detokenize
    )


def require_whole(outputs: Sequence[RequestOutput], output_len: int) -> None:
    """Raises EngineError when an answer ended early: the figures would be of another load."""
    for output in outputs:
        for answer in output.outputs:
            if len(answer.token_ids) != output_len:
                raise EngineError(
                    f"an answer has {len(answer.token_ids)} of {output_len} tokens "
                    f"({answer.finish_reason}: {answer.stop_reason}); nothing was measured"
                )


def require_room(llm: LLM, input_len: int, output_len: int) -> None:
    """Raises ConfigError when prompt and answer do not fit the context."""
    if input_len + output_len > llm.max_model_len:
        raise ConfigError(
            f"--input-len {input_len} and --output-len {output_len} are over max_model_len = "
            f"{llm.max_model_len} together; lower one of them"
        )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Percentage -> value, interpolated between the two nearest."""
    ordered = sorted(values)

    def at(percentage: int) -> float:
        place = percentage / 100 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {str(percentage): at(percentage) for percentage in PERCENTAGES}


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    """Nothing without a path. Raises ConfigError."""
    if path is None:
        return
    try:
        with open(path, "w", encoding="utf-8") as stream:
            json.dump(figures, stream, indent=2)
            stream.write("\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; the figures above are all there are"
        ) from error
