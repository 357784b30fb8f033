"""The page at /: what is sent to whom, what the file may not have, and the page in a browser.

The browser is a Chromium on the PATH, else the one of an npm package. It is driven over its
debugging pipe (JSON with a zero byte after each message), so no package of ours is needed.
"""

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
from quire.serving.shim.app import Guarded
from quire.serving.shim.page import Page

HTML = resources.files("quire.serving.shim").joinpath("static/index.html").read_text("utf-8")
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
WAIT_S = 60.0


def asked(method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what `/` answers."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "headers": encoded}
    asyncio.run(Guarded(Page().front, None, is_open=True)(scope, receive, send))
    start, body = sent
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body["body"]


class Tags(HTMLParser):
    """Every tag of the page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.all.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    "headers", [{}, {"Accept": "*/*"}, {"Accept": "application/json"}], ids=["none", "any", "json"]
)
def test_front_is_ollamas_text_for_clients_that_name_no_html(headers: dict[str, str]) -> None:
    status, answered, body = asked(**headers)
    assert (status, body) == (200, b"Ollama is running")
    assert answered["content-type"] == "text/plain; charset=utf-8"
    assert answered["vary"] == "accept"


def test_front_is_the_page_for_browsers() -> None:
    status, headers, body = asked(Accept=CHROME)
    assert (status, body) == (200, HTML.encode())
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["vary"] == "accept"


def test_front_allows_its_own_script_and_style_and_nothing_else() -> None:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    names = [tag for tag, _ in Tags().all]
    assert (names.count("script"), names.count("style")) == (1, 1)
    script = HTML.partition("<script>")[2].partition("</script>")[0]
    style = HTML.partition("<style>")[2].partition("</style>")[0]
    _, headers, _ = asked(Accept=CHROME)
    policy = headers["content-security-policy"].split("; ")
    assert sorted(policy) == [
        "base-uri 'none'",
        "connect-src 'self'",
        "default-src 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "img-src data:",  # the icon
        f"script-src {digest(script)}",
        f"style-src {digest(style)}",
    ]


def test_front_answers_head_and_refuses_what_writes() -> None:
    status, headers, _ = asked("HEAD")
    assert (status, headers["content-length"]) == (200, str(len(b"Ollama is running")))
    status, _, body = asked("POST")
    assert status == 405
    assert json.loads(body)["error"]["message"] == "/ takes GET, not POST"


def test_page_needs_nothing_from_elsewhere() -> None:
    assert not re.search(r"(?i:https?:|wss?:|@import|\bsrc(set)?=)|\burl\(", HTML)
    links = [attributes["href"] for _, attributes in Tags().all if "href" in attributes]
    assert [link[:22] for link in links] == ["data:image/png;base64,"]
    assert len(HTML.encode()) < 20_000
    assert "\r" not in HTML  # browsers read a line end as one character, and hash that


@pytest.mark.parametrize(
    "way",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "setHTML", "document.write", "DOMParser",
     "createContextualFragment", "eval(", "Function(", "srcdoc", "javascript:", "localStorage"],
)  # fmt: skip
def test_page_has_no_way_from_text_to_html_or_code(way: str) -> None:
    assert way.lower() not in HTML.lower()


def test_page_has_no_attribute_that_the_policy_forbids() -> None:
    names = {name for _, attributes in Tags().all for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}


def test_page_names_each_control_and_finds_each_id() -> None:
    tags = Tags().all
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("(\w+)"\)', HTML)) <= set(ids)
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    opened = re.findall(r'<label>[^<]+<input id="(\w+)"', re.sub(r"\s*\n\s*", "", HTML))
    controls = {attributes["id"] for tag, attributes in tags if tag in ("input", "textarea")}
    assert controls == (labelled - {None}) | set(opened)


# In a browser

NPM_PACKAGE = "@sparticuz/chromium@153.0.0"
NPM_SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
ON_PATH = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
UNBROTLI = "process.stdin.pipe(zlib.createBrotliDecompress()).pipe(process.stdout)"
KEY = "sesame"


def chromium() -> tuple[str, dict[str, str]]:
    """A browser's program, and the environment that it needs."""
    for name in ON_PATH:
        if found := shutil.which(name):
            return found, dict(os.environ)
    home = Path(tempfile.gettempdir()) / f"quire-tests-{os.geteuid()}" / f"browser-{NPM_SHA256[:8]}"
    if not home.is_dir():
        made = home.with_name(f"{home.name}-{os.getpid()}")
        unpack_from_npm(made)
        made.rename(home)
    libraries = f"{home / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}".strip(":")
    return str(home / "chromium"), os.environ | {"LD_LIBRARY_PATH": libraries}


def unpack_from_npm(folder: Path) -> None:
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.fail("there is no browser: install Chromium, or node and npm, which bring one")
    folder.mkdir(parents=True)
    command = ["npm", "pack", "--silent", NPM_PACKAGE]
    packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if packed.returncode != 0:
        pytest.fail(f"there is no Chromium here, and npm brings none:\n{packed.stderr}")
    tarball = folder / packed.stdout.split()[-1]
    assert hashlib.sha256(tarball.read_bytes()).hexdigest() == NPM_SHA256
    with tarfile.open(tarball) as package:
        package.extractall(folder, filter="data")
    tarball.unlink()
    for name in ("chromium", "al2023.tar"):  # the program, and libraries that a bare system lacks
        packed_file = folder / "package" / "bin" / f"{name}.br"
        with packed_file.open("rb") as source, (folder / name).open("wb") as target:
            subprocess.run(["node", "-e", UNBROTLI], stdin=source, stdout=target, check=True)
    (folder / "chromium").chmod(0o755)
    with tarfile.open(folder / "al2023.tar") as libraries:
        libraries.extractall(folder, filter="data")
    shutil.rmtree(folder / "package")


class Tab:
    """One page of a browser of its own; leaving the `with` ends the browser."""

    def __init__(self, profile: Path) -> None:
        program, environment = chromium()
        read, their_write = os.pipe()
        their_read, write = os.pipe()
        # Chromium reads from 3 and writes to 4; numbers above these are not in the way.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (their_read, their_write)]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", program, "--headless",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={profile}", "--window-size=1000,760", "--remote-debugging-pipe"],
            env=environment, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (their_read, their_write, *ends):
            os.close(fd)
        self._read, self._write = read, write
        self._rest = b""
        self._num_sent = 0
        self._session: str | None = None
        self.complaints: list[str] = []

    def __enter__(self) -> "Tab":
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # without its pipe it ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def do(self, method: str, **params: Any) -> Any:
        """One command of the DevTools protocol, and its result."""
        self._num_sent += 1
        command = {"id": self._num_sent, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._num_sent:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def value(self, expression: str) -> Any:
        """Of JavaScript; a promise is waited for."""
        done = self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def text(self, selector: str) -> str:
        """What can be seen of the last such element; nothing, if there is none."""
        last = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        return str(self.value(f"{last}?.checkVisibility() ? {last}.innerText : ''"))

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, self.value("document.body.innerText")
            time.sleep(0.02)

    def type(self, text: str, *, into: str) -> None:
        self.value(f"document.querySelector({json.dumps(into)}).focus()")
        self.do("Input.insertText", text=text)

    def press(self, key: str, code: int, *, shift: bool = False) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.do("Input.dispatchKeyEvent", type="keyDown", modifiers=8 * shift, **common, **text)
        self.do("Input.dispatchKeyEvent", type="keyUp", modifiers=8 * shift, **common)

    def enter(self, *, shift: bool = False) -> None:
        self.press("Enter", 13, shift=shift)

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], WAIT_S)
            piece = os.read(self._read, 1 << 16) if ready else b""
            assert piece, "the browser ended, or does not answer"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, message: Any) -> None:
        """What went wrong in the page; a refused request is no fault of it."""
        if message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]))
        entry = message.get("params", {}).get("entry", {})
        if entry.get("level") == "error" and entry["source"] != "network":
            self.complaints.append(entry["text"])


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a `quire serve` with the embedded model and a key."""
    code = "import sys; from quire.serving.cli import main; sys.exit(main())"
    small = ("--token-buckets", "8,64", "--max-num-batched-tokens", "64", "--max-num-seqs", "2")
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--grpc-port", "0", *small]
    said = folder / "said"
    with said.open("w") as stderr:
        environment = os.environ | {"QUIRE_API_KEY": KEY}
        process = subprocess.Popen(command, stderr=stderr, env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (found := re.search(r"ready in .* (http://\S+)", said.read_text())):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


# A server that says HTML, and then nothing more until it is left.
ENDLESS = """
var isLeft = false, plainFetch = fetch;
fetch = async (path, options) => {
  if (options.method !== "POST") return plainFetch(path, options);
  const chunk = { choices: [{ delta: { content: "<img src=x onerror=alert(1)>" } }] };
  const body = new ReadableStream({ start(stream) {
    stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
    const { signal } = options;
    signal.addEventListener("abort", () => { isLeft = true; stream.error(signal.reason); });
  } });
  return new Response(body);
};
"""


@pytest.mark.slow
def test_page_in_a_browser_asks_streams_stops_and_says_what_went_wrong(tmp_path: Path) -> None:
    with served(tmp_path) as address, Tab(tmp_path / "profile") as tab:
        tab.do("Page.navigate", url=f"{address}/")
        # A key is asked for once the server wants one.
        tab.until(lambda: "asks for a key" in tab.text("#problem"))
        tab.type(KEY, into="#key")
        tab.enter()
        tab.until(lambda: tab.text("#model") == "quire-demo · context 2,048")
        assert tab.text("#health") == "ready"
        assert tab.text("#problem") == tab.text("#keys") == ""

        tab.type("What is", into="#text")
        tab.enter(shift=True)
        assert tab.value("document.querySelector('#text').value") == "What is\n"
        tab.value("document.querySelector('#text').value = ''")
        tab.value("document.querySelector('#temperature').value = 0")
        tab.type("What is 23 + 58?", into="#text")
        tab.enter()
        tab.until(lambda: tab.text("article small"))
        assert tab.text("article.user p") == "What is 23 + 58?"
        assert tab.text("article:last-of-type p") == "23 + 58 = 81."
        assert tab.text("#said") == "23 + 58 = 81."
        figures = r"10 tokens · [\d.]+ tokens/s · first after \d+ ms"
        assert re.fullmatch(figures, tab.text("article small"))
        check_curl(address, tab.value("document.querySelector('#curl').textContent"))

        # What is refused goes back to where it was written.
        tab.value("document.querySelector('#temperature').value = 9")
        tab.type("Hello", into="#text")
        tab.enter()
        tab.until(lambda: "temperature must be" in tab.text("#problem"))
        assert tab.value("document.querySelector('#text').value") == "Hello"
        assert tab.value("document.querySelectorAll('article').length") == 2

        # An answer that is HTML stays text, and one that is stopped is left.
        tab.value(ENDLESS)
        tab.enter()
        tab.until(lambda: "<img" in tab.text("article:last-of-type p"))
        assert tab.value("document.images.length") == 0
        tab.press("Escape", 27)
        tab.until(lambda: tab.text("article:last-of-type small"))
        assert tab.text("article:last-of-type small").endswith("stopped")
        assert tab.value("isLeft") is True
        tab.value("fetch = plainFetch; document.querySelector('#fresh').click()")
        assert tab.value("document.querySelectorAll('article').length") == 0
        assert not tab.complaints


def check_curl(address: str, command: str) -> None:
    """It repeats the request, and shows no key."""
    assert KEY not in command
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["curl", "-N", f"{address}/v1/chat/completions"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    assert "Authorization: Bearer $QUIRE_API_KEY" in words
    body = json.loads(given["-d"])
    assert body["messages"] == [{"role": "user", "content": "What is 23 + 58?"}]
    answer = httpx.post(words[2], json=body, headers=headers, timeout=WAIT_S)
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
