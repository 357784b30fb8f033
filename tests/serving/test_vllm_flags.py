"""The flags of vLLM's guides: mapped, without effect, or refused with the way out."""

from typing import Any

import pytest
from quire.serving import cli


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine, the gateway and the shim would be told."""
    for name in ("QUIRE_API_KEY", "VLLM_API_KEY", "QUIRE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    told: list[Any] = []

    def start(engine: dict[str, Any], fronts: list[Any], _: Any) -> int:
        told[:] = [engine, fronts[0].options["serve"], fronts[1].options["http"]]
        return 0

    monkeypatch.setattr("quire.serving.supervisor.command.run_engine", start)
    return told


def test_a_line_of_a_guide_starts_the_same_server(
    started: list[Any], capsys: pytest.CaptureFixture[str]
):
    line = (
        "org/model --host 127.0.0.1 --port 8001 --dtype bfloat16 --max-model-len 4096 -tp 1 "
        "--gpu-memory-utilization 0.8 --max-num-seqs 32 --block-size 32 --enforce-eager "
        "--enable-prefix-caching --served-model-name a b --trust-remote-code "
        "--disable-log-requests --uvicorn-log-level warning --shutdown-timeout 5 "
        "--enable-chunked-prefill --async-scheduling --disable-log-stats --task generate "
        "--pipeline-parallel-size 1 --data-parallel-size=1 --swap-space 0 --stream-interval 1 "
        "--kv-cache-dtype auto --config-format auto --tokenizer-mode auto --seed 0 "
        '--root-path /llm --response-role bot --allowed-origins ["*"]'
    )
    assert cli.main(["serve", *line.split()]) == 0
    engine, serve, http = started
    assert engine == {
        "model": "org/model",
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.8,
        "max_num_seqs": 32,
        "page_size": 32,
        "lazy_compile": True,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    assert serve["served_model_name"] == ("a", "b")
    assert (serve["log_level"], serve["drain_timeout"]) == ("warning", 5.0)
    assert http["port"] == 8001
    assert (http["root_path"], http["response_role"]) == ("/llm", "bot")
    said = capsys.readouterr().err
    for note in (
        "--block-size is --page-size here",
        "--trust-remote-code has no effect: remote code is never executed",
        "--uvicorn-log-level is --log-level here",
    ):
        assert said.count(note) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--load-format pt", "pickle files are not read; convert the checkpoint to safetensors"),
        ("--load-format=npcache", "pickle files are not read"),
        ("--middleware x.y", "put a reverse proxy in front"),
        ("--distributed-executor-backend ray", "there is one process per engine"),
        ("--ray-workers-use-nsight", "many hosts are not supported yet"),
        ("--no-enable-chunked-prefill", "there are no phases to switch"),
        ("--swap-space 4", "preempted requests are recomputed"),
        ("--cpu-offload-gb 4", "weights stay on the device"),
        ("--kv-offloading-size 4", "preempted requests are recomputed"),
        ("--max-seq-len-to-capture 8192", "see --token-buckets"),
        ("--cudagraph-capture-sizes 1,2", "see --token-buckets"),
        ("--compilation-config 3", "see --token-buckets"),
        ("--num-scheduler-steps 8", "already one step ahead"),
        ("--multi-step-stream-outputs true", "already one step ahead"),
        ("--disable-custom-all-reduce", "XLA chooses the collectives"),
        ("-O3", "see --token-buckets"),
        ("-O.mode=3", "see --token-buckets"),
        ("-q awq", "unquantized checkpoint"),
        ("--quantization=gptq_marlin", "unquantized checkpoint"),
        ("--enable-lora", "LoRA adapters are not implemented yet"),
        ("--lora-modules a=b", "LoRA adapters are not implemented yet"),
        ("--lora-extra-vocab-size 8", "adapters with tokens of their own"),
        ("--speculative-config {}", "speculative decoding is not implemented yet"),
        ("--speculative-model x", "speculative decoding is not implemented yet"),
        ("--enable-auto-tool-choice", "tool calls are not parsed yet"),
        ("--tool-call-parser hermes", "tool calls are not parsed yet"),
        ("--reasoning-parser qwen3", "reasoning is not parsed yet"),
        ("--guided-decoding-backend outlines", "structured output is not implemented yet"),
        ("--otlp-traces-endpoint http://x", "tracing is not there yet"),
        ("-pp 2", "pipeline parallelism is not implemented yet"),
        ("-dp 2", "start one engine per replica"),
        ("--enable-expert-parallel", "expert parallelism is not implemented yet"),
        ("--kv-cache-dtype fp8", "quantized KV caches are not implemented yet"),
        ("--runner embed", "pooling models are not implemented yet"),
        ("--stream-interval 4", "every token is sent when it is there"),
        ("--config-format mistral", "config.json is read"),
        ("--max-model-length 5", "did you mean --max-model-len?"),
    ],
)
def test_what_is_not_there_is_refused_with_the_way_out(
    started: list[Any], capsys: pytest.CaptureFixture[str], flags: str, said: str
):
    try:
        code = cli.main(["serve", "org/model", *flags.split()])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert started == []
