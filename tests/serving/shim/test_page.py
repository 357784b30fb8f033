"""The pages at / and /docs: what is sent to whom, what the files may not have, and the pages in a
browser.
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from quire.serving.shim.app import Guarded
from quire.serving.shim.openapi import document
from quire.serving.shim.page import Page
from quire.serving.shim.server_routes import ServerRoutes

from .browser import WAIT_S, Tab

STATIC = resources.files("quire.serving.shim").joinpath("static")
HTML, DOCS = (STATIC.joinpath(name).read_text("utf-8") for name in ("index.html", "docs.html"))
BOTH = pytest.mark.parametrize("html", [HTML, DOCS], ids=["front", "docs"])
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


def asked(
    method: str = "GET", handler: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what `/` answers, or another handler of the page."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "headers": encoded}
    asyncio.run(Guarded(handler or Page().front, "GET", is_open=True)(scope, receive, send))
    start, body = sent
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body["body"]


class Tags(HTMLParser):
    """Every tag of the page with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.feed(html)

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


@BOTH
def test_page_allows_its_own_script_and_style_and_nothing_else(html: str) -> None:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    names = [tag for tag, _ in Tags(html).all]
    assert (names.count("script"), names.count("style")) == (1, 1)
    script = html.partition("<script>")[2].partition("</script>")[0]
    style = html.partition("<style>")[2].partition("</style>")[0]
    handler = Page().front if html == HTML else Page().docs
    _, headers, body = asked(handler=handler, Accept=CHROME)
    assert body == html.encode()
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
    status, headers, body = asked("POST")
    assert (status, headers["allow"]) == (405, "GET")
    assert json.loads(body)["error"]["message"] == "/ takes GET, not POST"


def test_pages_and_document_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    page, routes, made = Page(), ServerRoutes(cast(Any, None)), document(refuses_unknown=True)
    monkeypatch.setattr("quire.serving.shim.page._policy", None)
    for _ in range(2):
        assert asked(handler=page.docs)[2] == DOCS.encode()
        status, headers, body = asked(handler=routes.openapi)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(body) == made
        monkeypatch.setattr("quire.serving.shim.server_routes.document", None)


@BOTH
def test_page_needs_nothing_from_elsewhere(html: str) -> None:
    assert not re.search(r"(?i:https?:|wss?:|@import|\bsrc(set)?=)|\burl\(", html)
    links = [attributes["href"] for _, attributes in Tags(html).all if "href" in attributes]
    assert {link[:22] for link in links} <= {"data:image/png;base64,", "openapi.json", "./"}
    assert len(html.encode()) < 20_000
    assert "\r" not in html  # browsers read a line end as one character, and hash that


@pytest.mark.parametrize(
    "way",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "setHTML", "document.write", "DOMParser",
     "createContextualFragment", "eval(", "Function(", "srcdoc", "javascript:", "localStorage"],
)  # fmt: skip
@BOTH
def test_page_has_no_way_from_text_to_html_or_code(html: str, way: str) -> None:
    assert way.lower() not in html.lower()


@BOTH
def test_page_has_no_attribute_that_the_policy_forbids(html: str) -> None:
    names = {name for _, attributes in Tags(html).all for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}


def test_page_names_each_control_and_finds_each_id() -> None:
    tags = Tags(HTML).all
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("(\w+)"\)', HTML)) <= set(ids)
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    opened = re.findall(r'<label>[^<]+<input id="(\w+)"', re.sub(r"\s*\n\s*", "", HTML))
    controls = {attributes["id"] for tag, attributes in tags if tag in ("input", "textarea")}
    assert controls == (labelled - {None}) | set(opened)


# In a browser

KEY = "sesame"


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

        # What the routes take, for people.
        tab.do("Page.navigate", url=f"{address}/docs")
        tab.until(lambda: "/v1/chat/completions" in tab.text("main"))
        tab.value("document.querySelector('details').open = true")
        tab.until(lambda: "messages" in tab.text("details[open]"))
        assert "429" in tab.text("details[open]")
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
