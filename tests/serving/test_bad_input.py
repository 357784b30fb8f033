"""What a user can get wrong is answered in one line with the way out, and exit code 2."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from quire.serving.cli import main
from safetensors.numpy import load_file, save_file

REFERENCE = Path(__file__).parent.parent / "reference" / "llama2_mha"
WEIGHTS = "model.safetensors"


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def rename_tensor(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.extra": t.pop("model.norm.weight")}))


def shorten_tensor(folder: Path) -> None:
    edit_weights(
        folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].copy()})
    )


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "has no config.json; a model folder needs",
    ),
    "unknown type": (lambda f: edit_config(f, model_type="lama"), "the nearest is 'llama'"),
    "unknown key": (lambda f: edit_config(f, attn_logit_cap=3), "attn_logit_cap = 3"),
    "truncated": (truncate, "download it again"),
    "missing and unexpected": (
        rename_tensor,
        "1 missing tensors: model.norm.weight; 1 unexpected tensors: model.extra",
    ),
    "wrong shape": (
        shorten_tensor,
        "model.norm.weight: the config says [64], the file has [5]",
    ),
    "only pickle": (only_pickle, "safe_serialization=True"),
    "only tokenizer.model": (only_sentencepiece, "import AutoTokenizer as T"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = shutil.ignore_patterns("reference.safetensors", "text_cases.json")
    shutil.copytree(REFERENCE, tmp_path / "model", ignore=kept)
    return tmp_path / "model"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert main(["generate", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("quire: ")]
    assert len(told) == 1, lines
    assert lines[-1] == told[0]
    assert "Traceback" not in told[0]
    return told[0]


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_that_cannot_be_run(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, message = FOLDERS[case]
    spoil(folder)
    assert message in refused(capsys, str(folder), "--prompt", "hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "--prompt", "x"], "'./nowhere' does not exist; give the folder"),
        (["llama", "--prompt", "x"], "neither a folder nor a hub id"),
        (["org/name", "--prompt", "x"], "HF_HUB_OFFLINE is set; on a machine with access run: hf"),
        (["--prompt", "x", "--temperature", "nan"], "temperature"),
        (["--prompt", "x", "--top-p", "inf"], "top_p"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p must be"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be"),
        (["--prompt", "x", "--chat-template", "nowhere"], "neither a file nor a Jinja template"),
        (["--prompt", "x", "--tensor-parallel-size", "2"], "and there is 1 (cpu)"),
        (
            ["--prompt", "x", "--max-model-len", "2048", "--kv-cache-memory-bytes", "100000"],
            "raise kv_cache_memory_bytes",
        ),
    ],
)
def test_arguments_that_cannot_be_met(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "word " * 200], "but the context is 64"),
    ],
)
def test_prompts_that_cannot_be_met(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    small = ["--max-model-len", "64", "--max-num-batched-tokens", "64", "--token-buckets", "64"]
    assert message in refused(capsys, *small, *arguments)


def test_cache_of_someone_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    told = refused(capsys, "--prompt", "x", "--cache-dir", str(tmp_path))
    assert f"belongs to user {mine}, not to you ({mine + 1})" in told
    assert "set cache_dir or QUIRE_CACHE_DIR" in told
