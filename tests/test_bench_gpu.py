"""bench/gpu without a GPU: its measuring code on the CPU with small shapes, and what it refuses."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from quire.bench.gpu import attention, ceilings, correctness, deviceless, model, products, steps
from quire.bench.gpu.attention import Case
from quire.bench.gpu.results import Results
from quire.bench.gpu.timing import Bench, per_step

SMALL = (
    Case(3, 1, 100, 4, 2, 64, page_size=16, dtype=jnp.float32, window=40),
    Case(2, 40, 90, 4, 2, 64, page_size=16, dtype=jnp.float32, soft_cap=5.0),
)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path, device="cpu", measured=True, seconds=600)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name, value in (
        (attention, "DECODE", SMALL[:1]), (attention, "PREFILL", SMALL[1:]),
        (correctness, "ATTENTION", SMALL), (products, "SHAPES", {"qkv": (256, 128)}),
        (products, "ROWS", (1, 8)), (products, "_LEAST_BYTES", 1 << 18),
        (model, "MAX_NUM_SEQS", 8), (model, "MAX_BATCHED_TOKENS", 64),
        (steps, "BATCHES", (1, 8)), (steps, "CONTEXTS", (64, 900)), (steps, "NUM_STEPS", 8),
        (steps, "WARM_STEPS", 2), (steps, "MAX_MODEL_LEN", 1024), (steps, "PROMPTS", ((2, 100),)),
        (steps, "THROUGHPUT", ((8, 4, 5),)), (steps, "MAX_BATCH_PAGES", 100),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, value)


def written(results: Results, folder: Path) -> dict[str, dict[str, object]]:
    """By name; the file is whole and says what was measured on what."""
    results.write()
    found = json.loads((folder / "gpu.json").read_text())
    assert (found["device"], found["measured"]) == ("cpu", True)
    assert found["versions"]["jax"] == jax.__version__
    assert results.num_failed == 0, (folder / "gpu.log").read_text()
    return {line["name"]: line for line in found["lines"]}


def test_a_disturbed_run_does_not_make_steps_quick() -> None:
    """A read_bandwidth of -70 GB/s was seen on a busy machine."""
    assert per_step([0.25, 4.0, 0.5], [2.25, 3.0, 9.0], 10) == 0.2


def test_kernels_are_timed_beside_their_rooflines(results: Results, tmp_path: Path) -> None:
    bench = Bench(jax.devices()[0], measured=True)
    limits = ceilings.measure(bench, results, scale=64)
    attention.measure(bench, results, limits)
    products.measure(bench, results, limits)
    lines = written(results, tmp_path)
    for name in ("copy_bandwidth", "read_bandwidth", "matmul_bf16"):
        assert lines[name]["value"] > 0  # type: ignore[operator]
    for case in SMALL:
        line = lines[f"{case.name} share of roofline"]
        assert line["us"] > 0  # type: ignore[operator]
        # Each query sees its window, or what came before it.
        seen = 3 * 40 if case.window else 2 * sum(range(51, 91))
        assert line["flops"] == 4 * seen * 4 * 64
    assert lines["product[qkv,8] share of copy bandwidth"]["bytes"] == 2 * 256 * 128


@pytest.mark.slow
def test_steps_are_measured_and_what_does_not_fit_is_said(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = partial(model.make_builder, platform="cpu")
    monkeypatch.setattr(steps, "make_builder", builder)
    setup = steps.Setup(
        "135m", [jax.devices()[0]], 2 << 30, measured=False, num_layers=1, max_batched_tokens=64
    )
    made = steps.Model(setup)
    results.section("start", partial(made.start, results))
    steps.decode_steps(made, results, ceilings.PAPER)
    results.section("several", partial(steps.several_steps, made, results, 1, 64))
    results.section("graphs", partial(steps.without_graphs, made, results, 1, 64))
    results.section("host", partial(steps.host_time, made, results, 8))
    steps.prompts(made, results)
    steps.throughput(made, results)
    lines = written(results, tmp_path)
    assert lines["135m compile warm"]["compiled"] == 0
    for name in (
        "135m decode[1x64]", "135m decode[8x64]", "135m 8 steps in one[1x64]",
        "135m host time of a step at 8", "135m prompt[2x100]", "135m offline[8/4]",
    ):  # fmt: skip
        assert lines[name]["value"] > 0  # type: ignore[operator]
    assert "135m decode[8x900]" not in lines
    assert "135m decode[8x900]: its " in (tmp_path / "gpu.log").read_text()


def test_correctness_is_required(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = partial(correctness.choose, attention="jnp", linear="xla")
    monkeypatch.setattr(correctness, "choose", choose)
    for case in SMALL:
        correctness.check_attention(results, case, "cpu")
    correctness.check_product(results, 5, "cpu")
    correctness.check_family(results, "qwen2", "float32", "cpu")
    lines = written(results, tmp_path)
    assert all(line["met"] for line in lines.values() if "target" in line)
    monkeypatch.setattr(correctness, "ATTENTION_ERROR", {"float32": 0.0})
    with pytest.raises(AssertionError, match=r"correct decode\[.* is .*, and at most 0 is right"):
        correctness.check_attention(results, SMALL[0], "cpu")


def test_a_part_that_fails_ends_alone_and_late_ones_are_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path, device="cpu", measured=True, seconds=600)
    results.section("bad", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    late = Results(tmp_path / "late", device="cpu", measured=True, seconds=-1)
    late.section("late", lambda: late.add("never", 1, ""))
    assert (results.num_failed, late.num_failed) == (1, 1)
    assert results.lines == [{"name": "bad", "error": "ZeroDivisionError: division by zero"}]
    assert late.lines == [{"name": "late", "error": "left out, no time"}]
    assert "Traceback" in (tmp_path / "gpu.log").read_text()


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quire.bench.gpu", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.strip() == "there is no GPU here; --dry-run compiles for one"


def test_thunks_are_read_with_their_depth() -> None:
    text = (
        "000: kCommandBuffer [source | sink] \n"
        "    001: kCopy         [source | next=002 (1)] kCopy\n"
        "    002: kCustomKernel [prev=001 (1) | sink] fusion_1 grid: [4, 1, 1]\n"
        "003: kWhile         [prev=000 (1)]   \n"
        "condition:\n"
        "    004: kCustomKernel [source | sink] compare grid: [1, 1, 1]\n"
        "005: kAllReduce    [prev=003 (1)] kAllReduce\n"
    )
    thunks = deviceless.read_thunks(text)
    assert [(t.kind, t.name, t.depth) for t in thunks] == [
        ("kCommandBuffer", "", 0), ("kCopy", "kCopy", 1), ("kCustomKernel", "fusion_1", 1),
        ("kWhile", "", 0), ("kCustomKernel", "compare", 1), ("kAllReduce", "kAllReduce", 0),
    ]  # fmt: skip
    program = deviceless.Program(None, tuple(thunks))
    assert program.kernels == ["kCopy", "fusion_1", "compare"]
    assert [t.kind for t in program.outside_graphs] == ["kWhile", "kAllReduce"]
    assert (len(program.graphs), program.num_all_reduces) == (1, 1)


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviceless, "_installed", lambda name: name != "jax-cuda13-pjrt")
    monkeypatch.setattr(deviceless, "_toolkit", lambda: None)
    monkeypatch.setenv("PATH", "/nowhere")
    expected = r"needs jax-cuda13-pjrt, nvidia-cuda-nvcc==13.0.\*, nvidia-nvvm==13.0.\*, in"
    with pytest.raises(deviceless.Incomplete, match=expected):
        deviceless.prepare()
