"""A name is a path or a hub id; the hub here is a small server on the loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from quire.engine.errors import ModelError
from quire.engine.model_source import DEMO_FOLDER, find_model

COMMIT, BRANCH_COMMIT = "a" * 40, "b" * 40
FILES = {
    name: name.encode()
    for name in (
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt",
        "additional_chat_templates/tool.jinja",
    )
}  # fmt: skip
UNWANTED = dict.fromkeys(
    ("pytorch_model.bin", "modeling.py", "README.md", "original/consolidated.00.pth",
     "consolidated.safetensors", "original/params.json", "onnx/config.json", "weights.pt"),
    b"never",
)  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub for one public, one gated and no other model."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/gated"):
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        match path.strip("/").split("/", 5):
            case ["api", "models", "org", "public", "revision", revision]:
                commit = {"main": COMMIT, "dev": BRANCH_COMMIT}.get(revision)
                if commit is None:
                    return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return self.send(200, self.listing(commit), body)
            case ["api", "models", "org", "public", "tree", _]:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": name}
                    for name, data in (FILES | UNWANTED).items()
                ]
                return self.send(200, json.dumps(tree).encode(), body)
        match path.strip("/").split("/", 4):
            case ["org", "public", "resolve", commit, name] if name in FILES | UNWANTED:
                headers = {"X-Repo-Commit": commit, "ETag": f'"{name}"'}
                return self.send(200, (FILES | UNWANTED)[name], body, headers)
        return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def listing(self, commit: str) -> bytes:
        siblings = [{"rfilename": name} for name in FILES | UNWANTED]
        return json.dumps({"id": "org/public", "sha": commit, "siblings": siblings}).encode()

    def send(self, code: int, content: bytes, body: bool, headers: Any = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.paths = []
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    with running_hub() as server:
        yield server


SCRIPT = """
import json, sys
from quire.engine.errors import ModelError
from quire.engine.model_source import find_model
for name, revision in json.loads(sys.argv[1]):
    try:
        source = find_model(name, revision=revision)
        print(json.dumps([source.name, str(source.folder), source.revision]))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


def find(home: Path, endpoint: str, *models: tuple[str, str | None], offline: bool = False) -> Any:
    """find_model in a fresh process, which reads these variables when it imports the hub client."""
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    environment = keep | {
        "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(models)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_model_is_downloaded_without_pickle_and_code(
    hub: ThreadingHTTPServer, tmp_path: Path
):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    models = (("org/public", None), ("org/public@dev", None), ("org/public", "dev"))
    main, at_dev, dev = find(tmp_path, endpoint, *models)
    assert [main[0], main[2], at_dev[2]] == ["org/public", COMMIT, BRANCH_COMMIT]
    assert at_dev == dev
    folder = Path(main[1])
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == set(FILES)
    assert (folder / "config.json").read_bytes() == b"config.json"
    assert not any(name in path for path in hub.paths for name in UNWANTED)
    # Offline, what is there is found, and what is not is one line with the command.
    found, lost = find(
        tmp_path, endpoint, ("org/public", None), ("org/other@v2", None), offline=True
    )
    assert found == main
    assert lost == (
        "org/other at revision v2 is not in the local cache and HF_HUB_OFFLINE is set; on a "
        "machine with access run: hf download org/other --revision v2"
    )


def test_what_the_hub_refuses_is_one_line(hub: ThreadingHTTPServer, tmp_path: Path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    no_revision, unknown, gated = find(
        tmp_path, endpoint, ("org/public@v9", None), ("org/none", None), ("org/gated", None)
    )
    assert no_revision == "the model 'org/public' has no revision 'v9'; check its page"
    assert unknown == (
        "the hub has no model 'org/none', or it is private; check the name, or set HF_TOKEN"
    )
    assert gated == (
        "the model 'org/gated' is gated; accept its terms on its page and set HF_TOKEN"
    )


def test_a_hub_that_does_not_answer(tmp_path: Path):
    with running_hub() as server:
        port = server.server_port
    (message,) = find(tmp_path, f"http://127.0.0.1:{port}", ("org/public", None))
    assert message == (
        "org/public is not in the local cache and the hub cannot be reached; on a machine with "
        "access run: hf download org/public"
    )


def test_no_name_is_the_embedded_model():
    source = find_model(None)
    assert (source.name, source.folder, source.revision) == ("quire-demo", DEMO_FOLDER, None)


def test_a_folder_is_a_path_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org", "org/name", "./org/name", str(tmp_path / "org"), "~/org"):
        source = find_model(name)
        assert source.folder.is_dir()
        assert (source.name, source.revision) == (name, None)
    assert find_model("~/org").folder == tmp_path / "org"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no", "the model path './no' does not exist; give the folder that holds config.json"),
        ("~nobody-here/x", "the model path '~nobody-here/x' does not exist; give the folder"),
        ("./file", "the model path './file' is a file; give the folder that holds config.json"),
        ("/no/such", "the model path '/no/such' does not exist"),
        (
            "llama",
            "'llama' is neither a folder nor a hub id; give a path (./llama if it is a folder "
            "here) or org/name[@revision]",
        ),
        ("", "'' is neither a folder nor a hub id"),
        ("a/b/c", "'a/b/c' is neither a folder nor a hub id"),
        ("org/na me", "'org/na me' is neither a folder nor a hub id"),
        ("x" * 5000, "is neither a folder nor a hub id"),
        ("nul\0", "is neither a folder nor a hub id"),
    ],
    ids=range(10),
)
def test_a_name_that_is_nothing(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert message in str(caught.value)


def test_two_revisions_are_refused():
    with pytest.raises(ModelError) as caught:
        find_model("org/name@v1", revision="v2")
    assert str(caught.value) == (
        "the model 'org/name@v1' names revision 'v1' and the option revision is 'v2'; give one"
    )
