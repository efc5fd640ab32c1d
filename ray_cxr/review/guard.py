"""The gate in front of every page: who may ask, for what, and which headers answer.

Host            only 127.0.0.1, localhost and [::1], on any port because `ssh -L` may use another one: a foreign
                name that resolves to this machine (DNS rebinding) is refused
token, cookie   the token of the printed address works once and sets a cookie; every other request needs the cookie
other sites     `Sec-Fetch-Site` and `Origin` must be those of this page; a verdict must be JSON
size            the body of a request is limited
headers         no referrer, no cache, no frame, no script or style except our own files
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

#: Largest body of a request, bytes. A verdict has a few hundred.
MAX_BODY = 64 * 1024
_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
HEADERS: dict[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Session:
    """The one-time token and the cookie of a server. Both are random and compared in constant time."""

    def __init__(self, on_login: Callable[[str], None] | None = None) -> None:
        # Cookies are shared by all ports of a host, so two servers need two names.
        self.cookie_name = f"ray_cxr_{secrets.token_hex(4)}"
        self._cookie = secrets.token_urlsafe(32)
        self._on_login = on_login
        self.token = secrets.token_urlsafe(32)

    def redeem(self, token: str) -> str | None:
        """Return the cookie's value for the current token, which is then replaced; None for any other text."""
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return None
        self.token = secrets.token_urlsafe(32)
        if self._on_login is not None:
            self._on_login(self.token)
        return self._cookie

    def is_valid(self, header: str) -> bool:
        """Return whether a Cookie header holds the cookie."""
        pairs = (part.strip().partition("=") for part in header.split(";"))
        values = [value for name, _, value in pairs if name == self.cookie_name]
        return any(hmac.compare_digest(value.encode(), self._cookie.encode()) for value in values)

    def format_cookie(self, value: str) -> str:
        return f"{self.cookie_name}={value}; HttpOnly; SameSite=Strict; Path=/"


class Guard:
    """ASGI middleware that answers a request itself if it may not pass."""

    def __init__(self, app: Any, session: Session, refuse: Callable[[int, str], str]) -> None:
        """`refuse` renders the page of a refused request, from its status and a sentence."""
        self._app, self._session, self._refuse = app, session, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return  # no WebSocket
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = _check_host(headers) or _check_site(scope["method"], scope["path"], headers)
        if refusal is None and scope["path"] == "/" and (token := _read_token(scope)) is not None:
            if (cookie := self._session.redeem(token)) is not None:
                found = {"location": "/", "set-cookie": self._session.format_cookie(cookie)}
                await _answer(send, 303, "", found)
                return
            refusal = (401, "This address was used already. Open the newest address that `ray-cxr review` printed.")
        if refusal is None and not self._session.is_valid(headers.get("cookie", "")):
            refusal = (401, "Open the address with the token that `ray-cxr review` printed in its terminal.")
        if refusal is not None:
            await _answer(send, refusal[0], self._refuse(*refusal))
            return
        body = b""
        if scope["method"] != "GET":
            read = await _read_body(headers, receive)
            if read is None:
                text = f"The request is larger than {MAX_BODY:,} bytes."
                await _answer(send, 413, self._refuse(413, text))
                return
            body = read
        await self._app(scope, _replay(body, receive), _add_headers(send))


def _check_host(headers: Mapping[str, str]) -> tuple[int, str] | None:
    name, colon, port = headers.get("host", "").rpartition(":")
    host = name if colon and port.isdecimal() else headers.get("host", "")
    if host.lower() in _HOSTS:
        return None
    return 421, "This server answers only to 127.0.0.1 and localhost."


def _check_site(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Refuse requests that another site causes, also a page on another port of this machine."""
    if method not in ("GET", "POST"):
        return 405, "Only GET and POST are supported."
    site = headers.get("sec-fetch-site")
    # A link to the start page, such as in a terminal in the browser, shows nothing without the token or the cookie.
    is_entry = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
    if site not in (None, "none", "same-origin") and not is_entry:
        return 403, "The request comes from another site."
    if method == "GET":
        return None
    origin = headers.get("origin")
    if origin != f"http://{headers['host']}" and not (site == "same-origin" and origin in (None, "null")):
        return 403, "The request comes from another site."
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "The body must be application/json."
    return None


def _read_token(scope: Any) -> str | None:
    values = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("token")
    return values[0] if values else None


async def _read_body(headers: Mapping[str, str], receive: Any) -> bytes | None:
    """Return the body, or None if it is too large."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return None
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return body


def _replay(body: bytes, receive: Any) -> Any:
    """Return a `receive` that yields a body that was read already."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return parts.pop() if parts else await receive()

    return replay


def _add_headers(send: Any) -> Any:
    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message["headers"] if name.decode("latin-1") not in HEADERS]
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return send_with_headers


async def _answer(send: Any, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
    body = text.encode()
    named = {"content-type": "text/html; charset=utf-8", "content-length": str(len(body)), **(headers or {})}
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in named.items()],
    }
    await _add_headers(send)(start)
    await send({"type": "http.response.body", "body": body})
