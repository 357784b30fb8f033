"""Several devices that share a model give the answers of one.

Each number of devices runs in a process of its own (parallel_child.py), because a process keeps
the number of CPU devices it begins with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .engines import Comparison
from .margins import margin
from .parallel_models import CONFIGS, NUM_TOKENS, cases, write_model

ROOT = Path(__file__).parent.parent.parent
SIZES = (2, 4, 8)
# float32, and sums over shards in another order.
TOLERANCE = 2e-4

Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By number of devices: what the child told, and the arrays of each model."""
    folder = tmp_path_factory.mktemp("parallel") / "models"
    folder.mkdir()
    for name in CONFIGS:
        write_model(folder / name, name)
    made: Results = {}
    for size in (1, *SIZES):
        done = subprocess.run(
            [sys.executable, "-m", "tests.llm.parallel_child", str(size), str(folder)],
            cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        told = json.loads((folder / f"{size}.json").read_text())
        arrays = {name: dict(np.load(folder / f"{name}-{size}.npz")) for name in CONFIGS}
        made[size] = {"arrays": arrays, **told}
    return made


def whole_logits(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """f32[positions, vocab] of logprobs that were all asked for."""
    made = np.empty_like(arrays["logprobs"])
    np.put_along_axis(made, arrays["ids"], arrays["logprobs"], axis=-1)
    return made


def compare(results: Results, name: str, tokens: list[list[int]]) -> Comparison:
    """With the tokens of one device."""
    alone = results[1]["arrays"][name]
    logits = whole_logits(alone).reshape(*alone["tokens"].shape, -1)
    comparison = Comparison()
    for i, (_, params) in enumerate(cases(num_logprobs=-1)):
        expected = alone["tokens"][i].tolist()
        margins = [
            margin(row, expected[:step], expected[step], params)
            for step, row in enumerate(logits[i])
        ]
        comparison.add(expected, tokens[i], margins)
    print(f"{name}: {comparison.share:.2%} of {comparison.num_steps} steps compared")
    return comparison


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_of_one_device(results: Results, size: int, name: str) -> None:
    """Greedy and every kind of drawing, with NaN in every byte that no request owns."""
    tokens = results[size]["arrays"][name]["tokens"].tolist()
    assert compare(results, name, tokens).share >= 0.98


def test_several_steps_in_one_program_are_those_of_one_device(results: Results) -> None:
    assert compare(results, "llama", results[4]["loop_tokens"]).share >= 0.98
    assert results[4]["num_loop_steps"] < results[4]["llama"]["num_steps"]  # some were used


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_logprobs_are_those_of_one_device(results: Results, size: int, name: str) -> None:
    """Of the prompts, all of them, and of the answers up to a token that came out otherwise; all
    of the vocabulary from one model, the most likely ones from the other.
    """
    alone, shared = (results[n]["arrays"][name] for n in (1, size))
    is_same = np.cumprod(alone["tokens"] == shared["tokens"], axis=-1).astype(bool)
    known = np.concatenate([np.ones_like(is_same[:, :1]), is_same[:, :-1]], axis=-1).ravel()
    for prefix, rows in (("", known), ("prompt_", slice(None))):
        a, b = (arrays[f"{prefix}logprobs"][rows] for arrays in (alone, shared))
        width = b.shape[-1]
        assert (width == CONFIGS[name]["vocab_size"]) is (name == "llama")
        np.testing.assert_allclose(b, a[:, :width], atol=TOLERANCE, rtol=0)
        ids = shared[f"{prefix}ids"][rows]
        by_id = np.empty_like(a)
        np.put_along_axis(by_id, alone[f"{prefix}ids"][rows], a, axis=-1)
        told = np.take_along_axis(by_id, ids, axis=-1)
        np.testing.assert_allclose(b, told, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_a_layer_sums_over_devices_twice(results: Results, size: int, name: str) -> None:
    facts = results[size][name]
    assert facts["all_reduces"] == 2 * CONFIGS[name]["num_hidden_layers"] + 1  # and the embedding
    assert facts["other_collectives"] == 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_sampling_gathers_no_logits(results: Results, size: int, name: str) -> None:
    gathered = results[size][name]["gathered"]
    assert len(gathered) == 2
    for program, sizes in gathered.items():
        rows = 8
        assert sizes  # or the pattern finds nothing any more
        # Two numbers of each shard for the greedy token, twice 64 for the filters.
        most = rows * 2 * size * (1 if "greedy" in program else 64)
        assert max(sizes) <= most
    assert max(gathered["sample[8,greedy]"]) < rows * CONFIGS[name]["vocab_size"] / 8


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_memory_is_that_of_the_plan_and_the_cache_is_updated_in_place(
    results: Results, size: int, name: str
) -> None:
    facts, alone = results[size][name], results[1][name]
    assert facts["alias_bytes"] >= facts["kv_bytes"]
    plan = facts["plan"]
    assert plan["num_pages"] * plan["page_bytes"] == facts["kv_bytes"]
    assert plan["weights"] == facts["weight_bytes"]
    assert plan["rows"] == facts["row_bytes"]
    # With fewer heads than devices, each has one.
    heads = CONFIGS[name]["num_key_value_heads"]
    assert alone["plan"]["page_bytes"] == plan["page_bytes"] * min(heads, size)
    assert facts["weight_bytes"] < alone["weight_bytes"] / size * 1.5


def test_a_model_that_does_not_divide_is_refused_by_name(results: Results) -> None:
    assert results[8]["refusal"] == (
        "tensor_parallel_size = 8 does not divide num_attention_heads = 4; use 1, 2 or 4"
    )


def test_cases_are_not_all_close_calls(results: Results) -> None:
    tokens = results[1]["arrays"]["llama"]["tokens"]
    assert tokens.shape == (len(cases(num_logprobs=1)), NUM_TOKENS)
    assert len(np.unique(tokens)) > 100
