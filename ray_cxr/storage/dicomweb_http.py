"""Send requests to a PACS within limits of time and size, with retries, and without leaks to other hosts.

`requests` is used without its redirects, cookies, unpacking of compressed answers, and without the environment: no
proxy, no `~/.netrc` and no `REQUESTS_CA_BUNDLE` has an effect.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import io
import logging
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from ray_cxr.config import PacsSettings
from ray_cxr.errors import ImageError
from ray_cxr.storage.dicomweb_access import Access, Limiter, Unavailable, get_origin

#: Statuses of a server that is busy or restarts.
BUSY = frozenset({429, 500, 502, 503, 504})
#: Wait after the first attempt, seconds; each later one is twice as long, up to the maximum. A server's `Retry-After`
#: is respected up to the same maximum.
BACKOFF_S = 1.0
MAX_WAIT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 1 << 20
_CHUNK = 1 << 16
#: Consecutive requests without an answer after which the PACS counts as down, and the seconds until the next request
#: tries again; all others fail at once.
MAX_UNANSWERED = 20
DOWN_S = 60.0
_log = logging.getLogger(__name__)
_NOT_TRUSTED = "the certificate of the PACS is not trusted; set pacs.ca_file to the authority that signed it"
_NO_CERTIFICATE = "the PACS refuses the connection: it requires another client certificate; see pacs.client_certificate"
_NO_TLS = "the PACS does not use TLS at this port; name its port for https, or set up a proxy with TLS"

#: `at` is the time of `time.monotonic` when the request of this thread has to be complete.
_deadline = threading.local()


@dataclass(frozen=True)
class Answer:
    """A complete answer; `body` has at most the bytes that the caller allowed."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _TimedStream(io.RawIOBase):
    """Reads from a socket until the deadline of the request; the time-out of a socket starts again at each byte."""

    def __init__(self, stream: Any, sock: Any) -> None:
        self._stream, self._socket = stream, sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = _deadline.at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        count: int | None = self._stream.readinto(buffer)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_TimedStream(self.fp.detach(), sock), _CHUNK)


class _TimedConnection(HTTPConnection):
    response_class = _TimedResponse


class _TimedSecureConnection(HTTPSConnection):
    response_class = _TimedResponse


class _Pool(HTTPConnectionPool):
    ConnectionCls = _TimedConnection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _TimedSecureConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """Return no target: redirects are followed by `PacsSession`, after a check."""


class _Authorization(AuthBase):
    """Adds credentials to a request; not part of the session, so that no copy of its headers has them."""

    def __init__(self, access: Access, url: str) -> None:
        self._access, self._url, self.token = access, url, access.token

    def __call__(self, request: Any) -> Any:
        if self.token is not None:
            request.headers["Authorization"] = f"Bearer {self.token}"
        elif password := self._access.get_password(self._url):
            request.headers["Authorization"] = f"Basic {base64.b64encode(b':'.join(password)).decode()}"
        return request


class _NoAnswer(Exception):
    """An attempt failed in a way that may be temporary; the text is for users."""


class _Outage:
    """Counts the consecutive requests of this process that no attempt answered."""

    def __init__(self) -> None:
        self._lock, self._unanswered, self._next_try = threading.Lock(), 0, 0.0

    def check(self) -> None:
        """Raise Unavailable while the PACS counts as down; let one request through every `DOWN_S` seconds."""
        with self._lock:
            if self._unanswered < MAX_UNANSWERED:
                return
            now = time.monotonic()
            if now < self._next_try:
                raise Unavailable("the PACS is down, so no request was sent")
            self._next_try = now + DOWN_S

    def count(self, *, is_answered: bool) -> None:
        with self._lock:
            self._unanswered = 0 if is_answered else self._unanswered + 1
            if self._unanswered == MAX_UNANSWERED:
                self._next_try = time.monotonic() + DOWN_S
                _log.warning(
                    "the PACS does not answer (%d requests): other images fail at once with the code storage; run the "
                    "command again with --retry-errors later",
                    MAX_UNANSWERED,
                )


class PacsSession:
    """Sends requests of all threads of this process; connections are kept and used again."""

    def __init__(self, settings: PacsSettings, access: Access, limiter: Limiter) -> None:
        self._settings, self._access, self._limiter, self._outage = settings, access, limiter, _Outage()
        # Its messages of level DEBUG, and some warnings, contain the query.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._session = _Session()
        self._session.trust_env = False
        self._session.verify = settings.ca_file or True
        if settings.client_certificate:
            self._session.cert = (settings.client_certificate, settings.client_key or settings.client_certificate)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": "ray-cxr"})
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(pool_maxsize=settings.parallel))

    def exchange(
        self, method: str, url: str, headers: Mapping[str, str], *, max_bytes: int, body: bytes | None = None
    ) -> Answer:
        """Send a request until it is answered, at most `attempts` times, and return the answer with any status.

        Raises:
            Unavailable: No answer after all attempts, or the PACS did not answer the last `MAX_UNANSWERED` requests.
            ImageError: `storage` (an untrusted certificate, a redirect to another host, a compressed answer),
                `permission` (`pacs.host`, a client certificate is required) or `too_large`. Messages contain no
                address.
        """
        self._access.check_host(url)
        self._outage.check()
        wait, is_answered = BACKOFF_S, False
        for attempt in range(1, self._settings.attempts + 1):
            pause = min(MAX_WAIT_S, wait) * random.uniform(0.75, 1.25)
            try:
                with self._limiter.slot():
                    answer = self._send(method, url, headers, max_bytes, body)
                if answer.status not in BUSY:
                    self._outage.count(is_answered=True)
                    return answer
                is_answered = True
                failure = f"the PACS answers {describe_status(answer.status)}"
                pause = _parse_retry_after(answer.headers.get("Retry-After"), pause)
            except _NoAnswer as error:
                failure = str(error)
            if attempt < self._settings.attempts:
                time.sleep(pause)
                wait *= 2
        self._outage.count(is_answered=is_answered)
        raise Unavailable(f"{failure} ({self._settings.attempts} attempts)")

    def explain_refusal(self, url: str) -> str:
        """Return what to do after the answer 401."""
        return self._access.explain_refusal(url)

    def _send(self, method: str, url: str, headers: Mapping[str, str], max_bytes: int, body: bytes | None) -> Answer:
        """Send one request; follow redirects to the same scheme, host and port; replace a token that was refused."""
        _deadline.at = time.monotonic() + self._settings.timeout_s
        is_renewed = False
        origin = get_origin(url)
        for _ in range(_MAX_REDIRECTS):
            authorization = _Authorization(self._access, url)
            answer = self._transfer(method, url, headers, max_bytes, body, authorization)
            if answer.status == 401 and not is_renewed and self._access.renew_token(authorization.token):
                is_renewed = True
                continue
            if answer.status not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
                return answer
            try:
                url = urljoin(url, answer.headers["Location"])
                is_same = get_origin(url) == origin and "@" not in url
            except ValueError:
                is_same = False
            if not is_same:
                raise ImageError("storage", "the PACS redirects to another host, port or scheme, which is refused")
            if method != "GET" and answer.status not in (307, 308):
                raise ImageError("storage", "the PACS redirects in a way that would lose the document")
        raise ImageError("storage", f"the PACS redirects more than {_MAX_REDIRECTS} times")

    def _transfer(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        max_bytes: int,
        body: bytes | None,
        authorization: AuthBase,
    ) -> Answer:
        """Send one request, and read the answer until the deadline and up to the limit."""
        left = max(0.001, _deadline.at - time.monotonic())
        # The time-out of connecting is also the one of sending, so a document needs all of it.
        connect = min(CONNECT_TIMEOUT_S, left) if body is None else left
        late = f"no complete answer of the PACS within {self._settings.timeout_s:g} s"
        try:
            response = self._session.request(
                method,
                url,
                data=body,
                headers=dict(headers),
                auth=authorization,
                timeout=(connect, left),
                stream=True,
                allow_redirects=False,
            )
            with contextlib.closing(response):
                return Answer(response.status_code, response.headers, _read_body(response, max_bytes))
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            raise _NoAnswer(late) from None
        except (requests.ConnectionError, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise _explain(error) from None
        except (requests.RequestException, ValueError):
            # The texts of these errors contain the address.
            raise ImageError("storage", "the request cannot be sent; check the address and the settings") from None


def _read_body(response: Any, max_bytes: int) -> bytes:
    """Return the body, as it was sent; the body of an error only up to a small limit."""
    is_error = response.status_code >= 300 and response.status_code != 409
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        if is_error:
            return b""
        raise ImageError("storage", "the answer of the PACS is compressed, although it was asked not to be")
    body = bytearray()
    for chunk in response.raw.stream(_CHUNK, decode_content=False):
        body += chunk
        if is_error and len(body) > _MAX_ERROR_BYTES:
            return b""
        if not is_error and len(body) > max_bytes:
            raise ImageError("too_large", f"the answer of the PACS has more than {max_bytes} bytes")
    return bytes(body)


def _explain(error: Exception) -> Exception:
    """Return the error to raise for a failed connection, without the address that its text contains."""
    text = str(error).upper()
    if "CERTIFICATE_VERIFY_FAILED" in text or "HOSTNAME MISMATCH" in text:
        return ImageError("storage", _NOT_TRUSTED)
    if "WRONG_VERSION_NUMBER" in text or "RECORD LAYER FAILURE" in text:
        return ImageError("storage", _NO_TLS)
    if "ALERT" in text and ("CERTIFICATE" in text or "HANDSHAKE" in text or "UNKNOWN CA" in text):
        return ImageError("permission", _NO_CERTIFICATE)
    if re.search("NAMERESOLUTION|GETADDRINFO|NAME OR SERVICE", text):
        return _NoAnswer("the host of the PACS is unknown")
    if "REFUSED" in text or "UNREACHABLE" in text or "NEWCONNECTION" in text:
        return _NoAnswer("the PACS cannot be reached")
    return _NoAnswer("the connection to the PACS broke")


def _parse_retry_after(value: str | None, default: float) -> float:
    """Return the wait that a server asks for, seconds or a date, from 0 to `MAX_WAIT_S`; the default if it is odd."""
    if value is None:
        return default
    value = value.strip()
    if re.fullmatch("[0-9]{1,9}", value):
        seconds = float(value)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return default
    return min(MAX_WAIT_S, max(0.0, seconds))


def describe_status(status: int) -> str:
    """Return an HTTP status as text, without words of the server."""
    return f"{status} {http.client.responses.get(status, '')}".strip()


def check_status(answer: Answer, remedies: Mapping[int, str]) -> None:
    """Raise ImageError if an answer is not a success: `permission`, `missing` or `storage`.

    Args:
        remedies: what to do, by status; after the status in the message.
    """
    if 200 <= answer.status < 300:
        return
    code = {401: "permission", 403: "permission", 404: "missing", 410: "missing"}.get(answer.status, "storage")
    remedy = remedies.get(answer.status) or {403: "this account may not read it"}.get(answer.status, "")
    raise ImageError(code, f"the PACS answers {describe_status(answer.status)}{remedy and '; '}{remedy}")
