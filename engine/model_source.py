"""A model name -> a folder on disk: a path, a hub id, or the embedded model."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"

# Never *.bin, *.pt or *.py: pickle and code are not read.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "tekken.json", "*.txt"]
# The same weights again in another layout (Mistral), or for another runtime: gigabytes for nothing.
_IGNORED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is. revision: the commit of a hub download, None for a path."""

    name: str  # as the user knows it
    folder: Path
    revision: str | None = None


def find_model(
    name: str | None, *, revision: str | None = None, download_dir: str | None = None
) -> ModelSource:
    """The folder of a model; from a hub it is downloaded first. None is the embedded model.

    An existing folder, or anything that starts with '.', '/' or '~', is a path; org/name[@revision]
    is a hub id. Raises ModelError.
    """
    if name is None:
        return ModelSource("quire-demo", DEMO_FOLDER)
    # os.path, unlike Path, takes any text: too long for a name, or the home of nobody.
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return ModelSource(name, Path(path))
    if name.startswith((".", "/", "~")):
        kind = "is a file" if os.path.exists(path) else "does not exist"
        raise ModelError(f"the model path {name!r} {kind}; give the folder that holds config.json")
    hub_id, _, at = name.partition("@")
    if not _HUB_ID.fullmatch(hub_id):
        raise ModelError(
            f"{name!r} is neither a folder nor a hub id; give a path (./{name} if it is a folder "
            "here) or org/name[@revision]"
        )
    if at and revision and at != revision:
        raise ModelError(
            f"the model {name!r} names revision {at!r} and the option revision is {revision!r}; "
            "give one"
        )
    return _from_hub(hub_id, at or revision, download_dir)


def _from_hub(hub_id: str, revision: str | None, download_dir: str | None) -> ModelSource:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{hub_id}{f' at revision {revision}' if revision else ''}"
    command = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=_PATTERNS,
            ignore_patterns=_IGNORED,
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the model {hub_id!r} is gated; accept its terms on its page and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {hub_id!r}, or it is private; check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"the model {hub_id!r} has no revision {revision!r}; check its page"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if _is_offline() else "the hub cannot be reached"
        raise ModelError(
            f"{where} is not in the local cache and {reason}; on a machine with access run: "
            f"{command}"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelError(f"{where} could not be downloaded: {error}; try: {command}") from error
    return ModelSource(hub_id, Path(folder), Path(folder).name)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
