"""What a model's files say beside its weights, and what is said when they are wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigError, ModelError, UnsupportedModel
from quire.engine.model_files import ModelFiles, open_model

REFERENCE = Path(__file__).parent.parent / "reference"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(REFERENCE / "llama32_tied", tmp_path / "model")
    (tmp_path / "model" / "reference.safetensors").unlink()
    return tmp_path / "model"


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def read(folder: Path, **options: Any) -> ModelFiles:
    return open_model(EngineConfig(model=str(folder), **options))


def test_generation_config_gives_defaults_and_is_shown(folder: Path) -> None:
    change(
        folder / "generation_config.json",
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.05,
        max_new_tokens=99,
    )
    files = read(folder)
    assert files.text.default_sampling == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 99,
    }
    assert "sampling defaults of its own: temperature=0.6, top_p=0.9" in files.line()
    assert read(folder, generation_config="none").text.default_sampling == {}
    change(folder / "generation_config.json", do_sample=False)
    assert read(folder).text.default_sampling["temperature"] == 0


def test_end_of_sequence_ids_are_those_of_all_files(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[7, 8])
    change(folder / "config.json", eos_token_id=9)
    assert read(folder).eos_ids == {1, 7, 8, 9}
    change(folder / "config.json", eos_token_id="</s>")
    with pytest.raises(ModelError, match=r"eos_token_id must be token ids, got \['</s>'\]"):
        read(folder)


def test_dtype_follows_the_option_then_the_config(folder: Path) -> None:
    assert read(folder).dtype.name == "bfloat16"
    assert read(folder).kv_dtype.name == "float16"
    assert read(folder, dtype="float32").kv_dtype.name == "float32"
    change(folder / "config.json", dtype="int8")
    with pytest.raises(UnsupportedModel, match="dtype 'int8' is not one of bfloat16"):
        read(folder)


def test_broken_generation_config_is_said(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config.json is not valid JSON .*again"):
        read(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, got list"):
        read(folder)


def test_chat_template_is_a_file_or_a_template(folder: Path) -> None:
    path = folder / "mine.jinja"
    path.write_text("<{{ messages[0].content }}>")
    message = [{"role": "user", "content": "hi"}]
    for given in (str(path), path.read_text()):
        tokenizer = read(folder, chat_template=given).text.tokenizer
        assert tokenizer.apply_chat_template(message) == "<hi>"
    with pytest.raises(ConfigError, match="chat_template 'lost' is neither a file nor a Jinja"):
        read(folder, chat_template="lost")


def test_tokenizer_may_be_another_folders(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json"):
        read(folder)
    other = str(REFERENCE / "llama2_mha")
    assert read(folder, tokenizer=other).text.tokenizer.encode("Hello")[0] == 0


def test_dummy_weights_need_no_weight_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors file"):
        read(folder)
    assert read(folder, load_format="dummy").checkpoint is None


@pytest.mark.parametrize("defaults", [{"temperature": 3.0}, {"top_p": 0}, {"max_new_tokens": 0}])
def test_sampling_defaults_that_cannot_be_are_said_at_start(
    folder: Path, defaults: dict[str, Any]
) -> None:
    change(folder / "generation_config.json", **defaults)
    with pytest.raises(ModelError, match=r"generation_config.json: .*generation_config='none'"):
        read(folder)
    assert read(folder, generation_config="none").text.default_sampling == {}


def test_end_of_sequence_of_a_wrong_kind_is_said(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=[[1]])
    with pytest.raises(ModelError, match=r"eos_token_id must be token ids, got \[\[1\]\]"):
        read(folder)
