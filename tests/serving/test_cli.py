"""The command line: what it loads, what it prints, how it fails. Two tests start an engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quire
from quire.serving import cli

MODEL = Path(__file__).parents[1] / "reference" / "llama32_tied"
SMALL = ("--max-model-len", "32", "--max-num-seqs", "2", "--max-num-batched-tokens", "8")
HEAVY = ("jax", "jaxlib", "numpy", "transformers", "tokenizers", "huggingface_hub", "ml_dtypes")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("QUIRE_") or k == "QUIRE_CACHE_DIR"
    }
    code = "import sys; from quire.serving.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "action",
    [
        "import quire; quire.__version__; dir(quire)",
        "from quire import SamplingParams",
        "main(['--help'])",
        "main(['generate', '--help'])",
        "main(['--version'])",
        "main(['generate', '--prompt', 'x', '--temprature', '0'])",
        "main(['generate', '--prompt', 'x', '--temperature', '3'])",
        "main(['generate', '--prompt', 'x', '--max-model-len', 'long'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(action: str):
    script = f"""
import sys
from contextlib import suppress
{"from quire.serving.cli import main" if "main" in action else ""}
with suppress(SystemExit):
    {action}
print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.__stderr__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""


def test_the_package_names_what_it_has():
    assert set(quire.__all__) == set(dir(quire))
    with pytest.raises(AttributeError) as caught:
        quire.LLm  # noqa: B018
    assert str(caught.value).startswith("module 'quire' has no attribute 'LLm'; it has LLM, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "quire: the following arguments are required: COMMAND (see quire --help)"),
        (["generat"], "quire: argument COMMAND: invalid choice: 'generat'"),
        (["generate"], "quire generate: one of the arguments --prompt --chat --input is required"),
        (
            ["generate", "--prompt", "x", "--chat", "y"],
            "quire generate: argument --chat: not allowed with argument --prompt",
        ),
        (
            ["generate", "--prompt", "x", "--temprature", "0"],
            "quire generate: unknown flag --temprature; did you mean --temperature?",
        ),
        (
            ["generate", "--prompt", "x", "--max-seq", "8"],
            "quire generate: unknown flag --max-seq; did you mean --max-num-seqs?",
        ),
        (["generate", "a", "b", "--prompt", "x"], "quire generate: unexpected argument b"),
        (["generate", "--prompt", "x", "--top-k", "few"], "quire generate: argument --top-k: "),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error; only what was found out before may be said above it."""
    said = capsys.readouterr()
    assert said.out == ""
    *phases, last = said.err.splitlines()
    assert all(line.startswith("model ") for line in phases)
    assert last.startswith("quire: ")
    return last


def copy_of(tmp_path: Path, **config: Any) -> Path:
    """The reference model with changed keys of its config."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    keys = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def no_config(tmp_path: Path) -> Path:
    folder = copy_of(tmp_path)
    (folder / "config.json").unlink()
    return folder


def truncated(tmp_path: Path) -> Path:
    folder = copy_of(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: tmp / "none", "none' does not exist; give the folder that holds config.json"),
        (
            no_config,
            "has no config.json; a model folder needs config.json, *.safetensors and token",
        ),
        (
            lambda tmp: copy_of(tmp, model_type="lama"),
            "'lama' is not implemented; the nearest is 'l",
        ),
        (
            lambda tmp: copy_of(tmp, odd=1),
            "odd = 1. If they cannot change the answer, pass --ignore",
        ),
        (
            lambda tmp: copy_of(tmp, hidden_size="64"),
            "hidden_size must be a whole number, got '64'",
        ),
        (truncated, "the file is truncated or damaged; download it again"),
        (
            lambda tmp: copy_of(tmp, intermediate_size=64),
            "9 tensors of another shape: model.layers",
        ),
    ],
)
def test_an_unusable_model_is_one_line_and_exit_code_2(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["generate", str(make(tmp_path)), "--prompt", "x", *SMALL]) == 2
    assert message in the_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "3"], "quire: temperature must be a number from 0 (greedy) to 2"),
        (["--max-model-len", "4096"], "quire: max_model_len = 4096 is over the model's 2048"),
        (["--page-size", "3"], "quire: page_size must be a power of two, got 3"),
        (["--tensor-parallel-size", "2"], "quire: tensor_parallel_size = 2 needs as many devices"),
        (["--token-buckets", "0,8"], "quire: token_buckets must be at least "),  # 2 without kernels
        (["--dtype", "auto", "--chat-template", "none"], "quire: chat_template 'none' is neither"),
        (["--kv-cache-memory-bytes", "10"], "quire: one sequence of max_model_len = 32 tokens"),
    ],
)
def test_options_that_cannot_be_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["generate", str(MODEL), "--prompt", "x", *SMALL, *arguments]) == 2
    assert the_error(capsys).startswith(message)


def test_devices_share_a_model_and_say_so():
    options = ("--prompt", "x", "--max-tokens", "4", "--temperature", "0", "--dtype", "float32")
    done = run(
        "generate", str(MODEL), *options, *SMALL, "--tensor-parallel-size", "2",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 devices share the model; sizes below are those of each" in done.stderr
    assert done.stdout == run("generate", str(MODEL), *options, *SMALL).stdout


def test_an_error_ends_the_process_without_a_traceback():
    done = run("generate", "/no/such/model", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "quire: the model path '/no/such/model' does not exist; give the folder that holds "
        "config.json\n"
    )


def test_a_variable_gives_an_option_and_is_named_when_wrong():
    done = run("generate", "--prompt", "x", QUIRE_MODEL="/no/such/model")
    assert "the model path '/no/such/model' does not exist" in done.stderr
    done = run("generate", "--prompt", "x", QUIRE_MAX_NUM_SEQS="few")
    assert (done.returncode, done.stderr) == (
        2, "quire: the variable QUIRE_MAX_NUM_SEQS: must be a whole number, got 'few'\n"
    )  # fmt: skip


def test_generate_prints_the_text_alone_on_stdout(capsys: pytest.CaptureFixture[str]):
    sampling = ("--temperature", "0", "--max-tokens", "4", "--ignore-eos")
    assert cli.main(["generate", str(MODEL), "--prompt", "hello", *SMALL, *sampling]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("\n")
    assert len(said.out) > 1
    assert "4 tokens in " in said.err.splitlines()[-1]


def test_a_reader_that_goes_away_is_no_error():
    """`quire generate … | head -c1`: exit code 1 and no traceback, also not at interpreter exit."""
    sampling = ("--temperature", "0", "--max-tokens", "20", "--ignore-eos")
    command = [
        sys.executable,
        "-c",
        "import sys; from quire.serving.cli import main; sys.exit(main())",
    ]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*command, "generate", str(MODEL), "--prompt", "hello", *SMALL, *sampling],
        stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip
    os.close(write_end)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_env_names_versions_devices_and_folders(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["quire"] == quire.__version__
    assert lines["devices"].endswith("(cpu)")
    assert {"python", "jax", "numpy", "processors", "memory"} <= lines.keys()
