"""Who may reach a PACS, and how often: credentials, TLS files and limits on requests.

Secrets are read from files that only their owner can read. They are not part of any `repr`, message or pickle.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol
from urllib.parse import urlsplit

from ray_cxr.config import PacsSettings
from ray_cxr.errors import ConfigError, ImageError

_MAX_SECRET_BYTES = 1 << 20
_DEFAULT_PORTS = {"https": 443, "http": 80}
Origin = tuple[str, str, int]  # scheme, host, port


class Unavailable(ImageError):
    """The PACS gave no answer, or that it is busy, in all attempts; a later request can succeed."""

    def __init__(self, message: str) -> None:
        super().__init__("storage", message)
        self.args = (message,)  # so that it survives pickling between processes


class Limiter(Protocol):
    """Grants requests to a PACS."""

    def slot(self) -> AbstractContextManager[None]:
        """Wait until a request may start; the slot is free again when the block ends.

        A block lasts at most `timeout_s`, redirects included. Waits between attempts are outside of it.
        """
        ...


class ProcessLimiter:
    """At most `parallel` requests at a time and `per_second` requests per second, in this process."""

    def __init__(self, parallel: int, per_second: float) -> None:
        self._free = threading.BoundedSemaphore(parallel)
        self._lock = threading.Lock()
        self._interval = 1 / per_second
        self._next = 0.0

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        with self._free:
            with self._lock:
                start = max(self._next, time.monotonic())
                self._next = start + self._interval
            time.sleep(max(0.0, start - time.monotonic()))
            yield


class Access:
    """Credentials of a PACS, checked when it is created; only the names of files are pickled."""

    def __init__(self, settings: PacsSettings) -> None:
        """Read the files that the settings name.

        Raises:
            ConfigError: A file is missing, open to other users, or not of its kind; or settings do not fit together.
        """
        self._settings = settings
        if settings.credentials and settings.token_file:
            raise ConfigError("pacs.credentials, pacs.token_file: set one of them")
        if settings.client_key and not settings.client_certificate:
            raise ConfigError("pacs.client_key: set pacs.client_certificate too")
        if settings.host is None and (settings.token_file or settings.client_certificate):
            raise ConfigError(
                "pacs.host: set it to the host of the PACS, such as pacs.example.org; pacs.token_file and "
                "pacs.client_certificate are used for no other host"
            )
        self._host = None if settings.host is None else _parse_host(settings.host)
        self._passwords = _read_netrc(settings.credentials) if settings.credentials else {}
        self._token = _read_token(settings.token_file) if settings.token_file else None
        _check_tls(settings)

    def __repr__(self) -> str:
        return "Access()"

    def __reduce__(self) -> tuple[type[Access], tuple[PacsSettings]]:
        return Access, (self._settings,)

    def check_host(self, url: str) -> None:
        """Raise ImageError if `pacs.host` does not allow requests to the host of an http(s) address."""
        scheme, host, port = get_origin(url)
        if self._host is not None and (host, port) != (self._host[0], self._host[1] or _DEFAULT_PORTS[scheme]):
            raise ImageError("permission", "the address names another host than pacs.host; no request was sent")

    def get_password(self, url: str) -> tuple[bytes, bytes] | None:
        """Return user and password for the host of an address; None if it has none."""
        return self._passwords.get(get_origin(url)[1])

    def explain_refusal(self, url: str) -> str:
        """Return what to do after the answer 401, for the address of the request."""
        host = get_origin(url)[1]
        if self._passwords and host not in self._passwords:
            return f"{self._settings.credentials} has no line for {host}"
        return "set pacs.credentials or pacs.token_file, or check them"

    @property
    def token(self) -> str | None:
        return self._token

    def renew_token(self, refused: str | None) -> bool:
        """Read the token's file again after the PACS refused a token; return whether there is another one now."""
        if refused is None or self._settings.token_file is None:
            return False
        with contextlib.suppress(ConfigError):  # while another program writes the file, the old token remains
            self._token = _read_token(self._settings.token_file)
        return self._token != refused


def get_origin(url: str) -> Origin:
    """Return scheme, host and port of an http(s) address."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)


def _parse_host(text: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or "@" in text or parts.netloc != text:
        raise ConfigError("pacs.host: write HOST or HOST:PORT, such as pacs.example.org")
    return host.lower(), port


def _read_secret(name: str, path: str) -> str:
    """Return the text of a file that only its owner can read."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # a pipe can be read only once
            raise ConfigError(f"{name} {path}: not a regular file")
        if info.st_mode & 0o077 or info.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{name} {path}: other users can read or change it; run: chmod 600 {path}")
        with open(path, "rb") as file:
            return file.read(_MAX_SECRET_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{name} {path}: {error.strerror}; every node needs this file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} {path}: not a text file in UTF-8") from None


def _read_netrc(path: str) -> dict[str, tuple[bytes, bytes]]:
    _read_secret("pacs.credentials", path)
    try:
        hosts = netrc.netrc(path).hosts
    except netrc.NetrcParseError as error:  # its text quotes the file
        raise ConfigError(
            f"pacs.credentials {path}: line {error.lineno} cannot be read; write `machine HOST login USER password "
            "PASSWORD`"
        ) from None
    if "default" in hosts:
        raise ConfigError(f"pacs.credentials {path}: remove its `default` entry, which any host would obtain")
    if not hosts:
        raise ConfigError(f"pacs.credentials {path}: has no line `machine HOST login USER password PASSWORD`")
    return {host.lower(): (login.encode(), (password or "").encode()) for host, (login, _, password) in hosts.items()}


def _read_token(path: str) -> str:
    token = _read_secret("pacs.token_file", path).strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"pacs.token_file {path}: must hold one token: ASCII characters without blanks")
    return token


def _check_tls(settings: PacsSettings) -> None:
    """Load the files for TLS once, so that a wrong file is an error before the first request."""
    if settings.ca_file:
        try:
            ssl.create_default_context(cafile=settings.ca_file)
        except (OSError, ssl.SSLError) as error:
            reason = "not a PEM file with certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"pacs.ca_file {settings.ca_file}: {reason}") from None
    if settings.client_certificate:
        key = settings.client_key or settings.client_certificate
        _read_secret("pacs.client_key" if settings.client_key else "pacs.client_certificate", key)
        try:
            # Without a password here OpenSSL would ask for one on the terminal, and wait.
            ssl.create_default_context().load_cert_chain(settings.client_certificate, key, password="")
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = "no certificate with its unencrypted key, in PEM"
            if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
                reason = error.strerror or reason
            raise ConfigError(f"pacs.client_certificate {settings.client_certificate}: {reason}") from None
