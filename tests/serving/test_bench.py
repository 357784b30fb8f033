"""`quire bench`: what it counts, what it writes, what it refuses. Three tests start engines."""

import json
from pathlib import Path

import pytest
from quire.engine.errors import EngineError
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.serving import cli
from quire.serving.bench.figures import percentiles, require_whole

MODEL = str(Path(__file__).parents[1] / "reference" / "llama32_tied")
SMALL = ("--max-model-len", "32", "--max-num-seqs", "4", "--max-num-batched-tokens", "8")


def bench(tmp_path: Path, kind: str, *arguments: str) -> dict[str, object]:
    file = tmp_path / "figures.json"
    command = ["bench", kind, MODEL, *arguments, *SMALL, "--output-json", str(file)]
    assert cli.main(command) == 0
    figures: dict[str, object] = json.loads(file.read_text())
    return figures


def test_throughput_counts_every_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--input-len", "5", "--output-len", "7", "--num-prompts", "6", "--n", "2")
    figures = bench(tmp_path, "throughput", *lengths)
    assert figures["num_requests"] == 6
    assert figures["total_input_tokens"] == 6 * 5
    assert figures["total_output_tokens"] == 6 * 2 * 7
    assert figures["total_num_tokens"] == 6 * 5 + 6 * 2 * 7
    seconds = figures["elapsed_time"]
    assert isinstance(seconds, float)
    assert figures["output_tokens_per_second"] == pytest.approx(6 * 2 * 7 / seconds)
    assert "output tokens/s" in capsys.readouterr().out


def test_latency_leaves_the_warm_up_out(tmp_path: Path) -> None:
    counts = ("--num-iters", "3", "--num-iters-warmup", "1", "--batch-size", "2")
    figures = bench(tmp_path, "latency", *counts, "--input-len", "4", "--output-len", "4")
    latencies = figures["latencies"]
    assert isinstance(latencies, list)
    assert len(latencies) == 3
    assert figures["avg_latency"] == pytest.approx(sum(latencies) / 3)
    assert set(figures) == {"avg_latency", "std_latency", "latencies", "percentiles"}


def test_startup_is_cold_without_a_cache_and_warm_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ("--num-iters-cold", "1", "--num-iters-warmup", "1", "--num-iters-warm", "1")
    figures = bench(tmp_path, "startup", *counts)
    out = capsys.readouterr().out
    cold, _, warm = out.partition("WARM")
    assert " 0 loaded" in cold
    assert " 0 compiled" in warm
    assert figures["avg_cold_startup_time"] == figures["cold_startup_times"][0]  # type: ignore[index]


def test_a_start_that_is_refused_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["bench", "startup", "./nowhere", "--num-iters-cold", "1"])
    assert code == 2
    assert "./nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--num-iters", "0"), "--num-iters: must be a whole number of at least 1"),
        (("throughput", "--output-len", "x"), "--output-len: must be a whole number"),
        (("serve",), "invalid choice"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["bench", "latency", "--output-json", "/no/such/folder/x"]) == 2
    assert "cannot write /no/such/folder/x" in capsys.readouterr().err


def test_lengths_over_the_context_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--input-len", "30", "--output-len", "3")
    assert cli.main(["bench", "latency", MODEL, *SMALL, *lengths]) == 2
    assert "max_model_len = 32" in capsys.readouterr().err


def test_percentiles_lie_between_the_nearest() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "10": pytest.approx(1.4), "25": 2.0, "50": 3.0, "75": 4.0,
        "90": pytest.approx(4.6), "99": pytest.approx(4.96),
    }  # fmt: skip


def test_an_answer_that_ended_early_is_no_figure() -> None:
    answer = CompletionOutput(0, token_ids=[1, 2], finish_reason="error", stop_reason="why")
    output = RequestOutput("0", None, [1], None, [answer])
    require_whole([output], 2)
    with pytest.raises(EngineError, match=r"2 of 3 tokens \(error: why\)"):
        require_whole([output], 3)
