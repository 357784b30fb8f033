"""The page at /: a browser gets a place to try the model, everybody else the text that Ollama's
clients look for. Knows nothing of the engine; what the page asks, it asks of the routes.
"""

import base64
import hashlib
import re
from importlib import resources

from .http import Receive, Reply, Scope

_FRONT, _DOCS = "static/index.html", "static/docs.html"
_HELLO = b"Ollama is running"


class Page:
    """Handlers, each for one route."""

    def __init__(self) -> None:
        self._front = _Html(_FRONT)
        self._docs = _Html(_DOCS)

    async def front(self, scope: Scope, _: Receive, reply: Reply, __: str | None) -> None:
        """HEAD too: by it Ollama's clients see whether a server is there."""
        if _wants_html(scope):
            await self._front.send(reply)
        else:
            await reply.raw(_HELLO, "text/plain; charset=utf-8", headers={"vary": "accept"})

    async def docs(self, _: Scope, __: Receive, reply: Reply, ___: str | None) -> None:
        """/openapi.json for people."""
        await self._docs.send(reply)


class _Html:
    """One file, and the headers that it is sent with."""

    def __init__(self, file: str) -> None:
        self._html = resources.files("quire.serving.shim").joinpath(file).read_bytes()
        self._headers = {
            "content-security-policy": _policy(self._html),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
            "vary": "accept",
        }

    async def send(self, reply: Reply) -> None:
        await reply.raw(self._html, "text/html; charset=utf-8", headers=self._headers)


def _wants_html(scope: Scope) -> bool:
    """Browsers name it; the */* of others does not count."""
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return b"text/html" in accepted.lower()


def _policy(html: bytes) -> str:
    """What the page may do: run its own script, look as it does, and call the server it is from."""
    allowed = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "script-src": _hashes(html, b"script"),
        "style-src": _hashes(html, b"style"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{what} {where}" for what, where in allowed.items())


def _hashes(html: bytes, tag: bytes) -> str:
    """Of what stands in each of the tags, as CSP writes them."""
    found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(one).digest()).decode() for one in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
