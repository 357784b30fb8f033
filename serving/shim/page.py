"""The page at /: a browser gets a place to try the model, everybody else the text that Ollama's
clients look for. Knows nothing of the engine; what the page asks, it asks of the routes.
"""

import base64
import hashlib
import re
from importlib import resources

from .http import Receive, Reply, Scope
from .openai.errors import HttpError

_FRONT, _DOCS = "static/index.html", "static/docs.html"
_HELLO = b"Ollama is running"


class Page:
    """Handlers, each for one route."""

    def __init__(self) -> None:
        self._front = _read(_FRONT)
        self._docs = _read(_DOCS)

    async def front(self, scope: Scope, _: Receive, reply: Reply, __: str | None) -> None:
        """GET, and HEAD: by it Ollama's clients see whether a server is there."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HttpError(
                405,
                f"{scope['path'][:200]} takes GET, not {scope['method'][:20]}",
                type="invalid_request_error",
                headers={"allow": "GET"},
            )
        if _wants_html(scope):
            await _html(reply, self._front)
        else:
            await reply.raw(_HELLO, "text/plain; charset=utf-8", headers={"vary": "accept"})

    async def docs(self, _: Scope, __: Receive, reply: Reply, ___: str | None) -> None:
        """/openapi.json for people."""
        await _html(reply, self._docs)


def _read(file: str) -> bytes:
    return resources.files("quire.serving.shim").joinpath(file).read_bytes()


async def _html(reply: Reply, html: bytes) -> None:
    headers = {
        "content-security-policy": _policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
        "vary": "accept",
    }
    await reply.raw(html, "text/html; charset=utf-8", headers=headers)


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
