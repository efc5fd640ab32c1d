"""Read and decode in a child process, so that a crash of native code or an endless file costs one row only.

    parent                                    child: python -m ray_cxr.imaging.sandbox
    Decoder.load(path or contents)  -- stdin -->  read_bytes, decode, read_tags, resize
    DecodedImage | Failure              <- stdout --  pixels, or a code and a message

    Decoder.identify(path or contents)          open_stream, read_leading_tags, SHA-256
    tags | Failure                      <- stdout --

Both directions carry frames: the lengths of two parts, a JSON object, and raw bytes. The child runs the same functions
as decoding in-process, so pixels and codes are equal. Output of decoders goes to the null device.

The child ends when its parent ends, because its standard input ends then. The child sets an alarm for each file, which
ends the child if native code hangs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Self, TypeVar

import cv2
import numpy as np

from ray_cxr import processes
from ray_cxr.config import InputSpec
from ray_cxr.errors import ERROR_CODES, ImageError, RayCxrError
from ray_cxr.imaging.decode import HEADER_FLAGS, decode_with_flags, is_png_or_jpeg
from ray_cxr.imaging.pixels import MAX_PIXELS, decoder_errors
from ray_cxr.imaging.resize import resize
from ray_cxr.storage.files import read_bytes
from ray_cxr.storage.paths import DICOM_HEAD, is_dicomweb
from ray_cxr.storage.stores import open_stream

_T = TypeVar("_T")

#: Maximum time until a child is ready, seconds: mostly imports on a busy machine.
START_TIMEOUT_S = 120.0
_MAX_STARTS = 3  # of a child that is killed while it starts
#: Seconds from the parent's timeout to the child's own alarm.
_ALARM_MARGIN_S = 10.0
_PIPE_BYTES = 1024 * 1024  # holds a whole NIH file
_FRAME = struct.Struct("<IQ")  # bytes of JSON, raw bytes
_MAX_JSON = 16 * 1024 * 1024
_ALARM = signal.SIGALRM.name
_UNREADABLE = "an unreadable answer"


@dataclass(frozen=True)
class DecodedImage:
    """One decoded radiograph."""

    images: tuple[np.ndarray, ...]  # in the order of the specs: uint8[S, S], or uint8[H, W] for None
    tags: Mapping[str, Any] | None  # if requested: `dicom.read_tags` of a DICOM file, and `content_digest`
    shape: tuple[int, int] | None = None  # height and width before the resize, pixels
    flags: tuple[str, ...] = ()  # quality flags from the header of a DICOM file


@dataclass(frozen=True)
class Failure:
    """The `code` and `message` of an `ImageError`, and the tags that could be read."""

    code: str
    message: str
    tags: Mapping[str, Any] | None


class Decoder:
    """One child process that reads, decodes and resizes; not thread-safe.

    `start` or the first `load` starts the child, and the next `load` replaces a child that was lost. A spec of None
    keeps the original size. `timeout_s` limits the time to read and decode one file. With `tags`, the header fields of
    DICOM files are read too; with `digest`, the tags have `content_digest`, the SHA-256 of the file, hex. `seconds` is
    the duration of the last `load` without the start of a child; 0 if there was nothing to read.
    """

    def __init__(
        self,
        specs: Sequence[InputSpec | None],
        *,
        max_pixels: int = MAX_PIXELS,
        timeout_s: float = 60.0,
        tags: bool = False,
        digest: bool = False,
    ) -> None:
        self._specs = tuple(specs)
        self._timeout_s = float(timeout_s)
        self._max_pixels = max_pixels
        self._settings = {
            "specs": [None if spec is None else spec.model_dump() for spec in self._specs],
            "max_pixels": max_pixels,
            "alarm_s": self._timeout_s + _ALARM_MARGIN_S,
            "tags": tags,
            "digest": digest,
        }
        self.seconds = 0.0
        self._child: _Child | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Start the child, if none runs, without waiting for it."""
        if self._child is not None and self._child.process.poll() is None:
            return
        self.close()
        self._child = _Child(self._settings)
        # Also without a call of `close`, no child remains and Popen does not warn about a running child.
        self._finalizer = weakref.finalize(self, self._child.kill)

    def load(self, source: str | bytes | None) -> DecodedImage | Failure:
        """Read, decode and resize one radiograph: a path or URI, the contents of a file, or None (`missing`).

        A child may be killed for a reason other than the file, so a second child tries the file. If that is lost too,
        the code is `decoder_crash`. Other codes are `decode_timeout` and those of `decode.load_image`.
        """
        return self._exchange(source, {}, self._receive)

    def identify(self, source: str | bytes | None, *, header: bool, digest: bool) -> Mapping[str, Any] | Failure:
        """Return what identifies a file, without decoding: `dicom.read_tags` of a DICOM file, and `content_digest`.

        Without `digest`, no more of a file is read than its header. The failures are those of `load`.
        """
        return self._exchange(source, {"header": header, "digest": digest}, self._receive_tags)

    def _exchange(
        self, source: str | bytes | None, wanted: Mapping[str, Any], receive: Callable[[_Child, float], _T | Failure]
    ) -> _T | Failure:
        """Send a file to the child and return its answer; a second child gets a file at which the first was lost."""
        self.seconds = 0.0
        if isinstance(source, str) and is_dicomweb(source):
            # Only this process has the credentials of the PACS, and the limits of requests.
            try:
                source = read_bytes(source)
            except ImageError as error:
                return Failure(error.code, error.message, None)
        if not isinstance(source, (str, bytes, bytearray, memoryview)):
            return Failure("missing", "the row has no path", None)
        path, data = (source, b"") if isinstance(source, str) else (None, source)
        outcome = ""
        for _ in range(2):
            child = self._start_and_wait()
            started = time.monotonic()
            deadline = started + self._timeout_s
            try:
                _send(child.requests, {"path": path, **wanted}, [memoryview(data)], deadline)
                return receive(child, deadline)
            except TimeoutError:
                outcome = _ALARM
            except EOFError as lost:
                outcome = str(lost) or child.describe_exit()
            except BaseException:  # an interrupt: the next file must not get this answer
                self.close()
                raise
            finally:
                self.seconds += time.monotonic() - started
            self.close()
            if outcome == _ALARM:  # also if the child's own alarm ended it while this process was suspended
                return Failure("decode_timeout", f"not read and decoded within {self._timeout_s:g} s", None)
        return Failure("decoder_crash", f"the decoder process ended with {outcome}", None)

    def close(self) -> None:
        """End the child; a later `load` starts a new one."""
        if self._finalizer is not None:
            self._finalizer()
        self._child = self._finalizer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_and_wait(self) -> _Child:
        """Return a child that reported that it is ready; only then can a file cause its death."""
        reason = ""
        for _ in range(_MAX_STARTS):
            self.start()
            child = self._child
            assert child is not None
            if child.ready:
                return child
            try:
                child.wait_until_ready(time.monotonic() + START_TIMEOUT_S)
                return child
            except TimeoutError:
                reason = f"not ready after {START_TIMEOUT_S:g} s"
            except EOFError as lost:
                reason = str(lost) or child.describe_exit()
                killed = reason.startswith("SIG")
                if line := child.read_last_line():
                    reason = f"{reason}: {line}"
                if not killed:  # a new child would fail too
                    break
            finally:
                if not child.ready:
                    self.close()
        raise RayCxrError(
            f"the decoder process cannot start ({reason}); for details run {sys.executable} -m ray_cxr.imaging.sandbox"
        )

    def _receive_tags(self, child: _Child, deadline: float) -> Mapping[str, Any] | Failure:
        try:
            answer, size = _receive(child.answers, deadline)
            return _parse_failure(answer, size) or dict(answer["tags"])
        except (ValueError, KeyError, TypeError):
            raise EOFError(_UNREADABLE) from None

    def _receive(self, child: _Child, deadline: float) -> DecodedImage | Failure:
        try:
            answer, size = _receive(child.answers, deadline)
            if failure := _parse_failure(answer, size):
                return failure
            tags, flags = answer["tags"], tuple(map(str, answer["flags"]))
            height, width = map(int, answer["shape"])
            shapes = [(height, width) if spec is None else (spec.size, spec.size) for spec in self._specs]
            possible = height > 0 and 0 < height * width <= self._max_pixels and HEADER_FLAGS.issuperset(flags)
            if not possible or size != sum(rows * columns for rows, columns in shapes):
                raise EOFError(_UNREADABLE)
        except (ValueError, KeyError, TypeError):  # native code corrupted the child's memory
            raise EOFError(_UNREADABLE) from None
        images = tuple(np.empty(shape, np.uint8) for shape in shapes)
        for image in images:
            _read_into(child.answers, image.data.cast("B"), deadline)
        return DecodedImage(images, tags, (height, width), flags)


def _parse_failure(answer: Mapping[str, Any], size: int) -> Failure | None:
    """Return the failure in an answer that `size` raw bytes follow; None if it has none."""
    if "code" not in answer:
        return None
    if size or answer["code"] not in ERROR_CODES:
        raise EOFError(_UNREADABLE)
    return Failure(answer["code"], answer["message"], answer["tags"])


class _Child:
    """A process, and the descriptors of its two pipes. Reading from and writing to them raises TimeoutError after the
    deadline, and EOFError if the process ended or answers nonsense.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.ready = False
        # Explains why a child does not start. A child closes it when it is ready, before it sees any file.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # Thread pools of libraries slow down the start, and decoding does not use them.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        variables = {"PYTHONPATH": processes.build_module_path(), **threads}
        try:
            self.process = subprocess.Popen(
                # -P: otherwise a numpy.py in the working directory would be imported.
                [sys.executable, "-P", "-W", "ignore", "-m", "ray_cxr.imaging.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                env={**os.environ, **variables},
            )
        except OSError as error:
            self._stderr.close()
            raise RayCxrError(f"the decoder process cannot start ({error.strerror or type(error).__name__})") from None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._pipes = (self.process.stdin, self.process.stdout)
        self.requests, self.answers = (pipe.fileno() for pipe in self._pipes)
        for pipe in (self.requests, self.answers):
            os.set_blocking(pipe, False)
            if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
                with contextlib.suppress(OSError):
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        with contextlib.suppress(EOFError, TimeoutError):  # `wait_until_ready` will raise it
            _send(self.requests, settings, [], time.monotonic() + START_TIMEOUT_S)

    def wait_until_ready(self, deadline: float) -> None:
        try:
            _receive(self.answers, deadline)
        except ValueError:
            raise EOFError(_UNREADABLE) from None
        self._stderr.close()
        self.ready = True

    def describe_exit(self) -> str:
        """Return how the process ended after closing its pipe: the name of a signal, or `exit code 1`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        code = self.process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"SIGRTMIN+{-code - signal.SIGRTMIN}"  # real-time signals have no name

    def read_last_line(self) -> str:
        """Return the last line that the process printed before it was ready, shortened."""
        self._stderr.seek(0)
        lines = self._stderr.read()[-4096:].decode(errors="replace").split("\n")
        return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")

    def kill(self) -> None:
        """End the process and wait for it; can be called repeatedly."""
        self.process.kill()
        for stream in (*self._pipes, self._stderr):
            stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a killed process can still wait for a network disk
            self.process.wait(5.0)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Wait until a pipe can be read or written or its other end is closed."""
    poll = select.poll()
    poll.register(descriptor, event)
    while not poll.poll(min(max(0.0, deadline - time.monotonic()), 3600.0) * 1000.0):  # poll takes at most 2^31 ms
        if time.monotonic() >= deadline:
            raise TimeoutError


def _receive(descriptor: int, deadline: float = float("inf")) -> tuple[dict[str, Any], int]:
    """Return the JSON object of a frame, and the number of raw bytes that follow in the pipe."""
    length, size = _FRAME.unpack(_read(descriptor, _FRAME.size, deadline))
    if length > _MAX_JSON:
        raise EOFError(_UNREADABLE)
    return json.loads(_read(descriptor, length, deadline)), size


def _read(descriptor: int, size: int, deadline: float = float("inf")) -> bytes:
    data = bytearray(size)
    _read_into(descriptor, memoryview(data), deadline)
    return bytes(data)


def _read_into(descriptor: int, view: memoryview, deadline: float) -> None:
    """Fill a buffer from a pipe; raise EOFError if the other end is closed."""
    while view:
        _wait(descriptor, select.POLLIN, deadline)
        try:
            count = os.readv(descriptor, [view])
        except BlockingIOError:
            continue
        if not count:
            raise EOFError
        view = view[count:]


def _send(
    descriptor: int, header: Mapping[str, Any], body: Sequence[memoryview], deadline: float = float("inf")
) -> None:
    """Write a frame; raise EOFError if the other end is closed."""
    text = json.dumps(header).encode()
    views = [memoryview(_FRAME.pack(len(text), sum(map(len, body))) + text), *body]
    while views:
        try:
            count = os.writev(descriptor, views)
        except BlockingIOError:
            _wait(descriptor, select.POLLOUT, deadline)
            continue
        except BrokenPipeError:
            raise EOFError from None
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views:
            views[0] = views[0][count:]


# ---------------------------------------------------------------- in the child


def _load(
    path: str | None, data: bytes, specs: Sequence[InputSpec | None], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the JSON object and the pixels of an answer."""
    header: dict[str, Any] | None = None
    try:
        with decoder_errors("image"):  # also a MemoryError in the resize, or an exception while a decoder prints
            if path is not None:
                data = read_bytes(path)
            if settings["digest"]:
                header = {"content_digest": hashlib.sha256(data).hexdigest()}
            if settings["tags"] and (found := _read_tags(data)) is not None:
                header = found | (header or {})
            image, flags = decode_with_flags(data, max_pixels=settings["max_pixels"])
            images = [image if spec is None else resize(image, spec) for spec in specs]
            return {"tags": header, "shape": image.shape, "flags": flags}, images
    except ImageError as error:
        return {"code": error.code, "message": error.message, "tags": header}, []


def _identify(path: str | None, data: bytes, header: bool, digest: bool) -> dict[str, Any]:
    """Return the JSON object of an answer to `Decoder.identify`."""
    tags: dict[str, Any] = {}
    try:
        with decoder_errors("image"):
            if digest:
                data = data if path is None else read_bytes(path)
                tags["content_digest"] = hashlib.sha256(data).hexdigest()
                opened: contextlib.AbstractContextManager[Callable[[int], bytes]]
            opened = contextlib.nullcontext(io.BytesIO(data).read) if digest or path is None else open_stream(path)
            with opened as fetch:
                start = fetch(DICOM_HEAD) if header else b""
                if start and not is_png_or_jpeg(start):
                    tags |= _read_leading_tags(start, fetch)
    except ImageError as error:
        return {"code": error.code, "message": error.message, "tags": tags}
    return {"tags": tags}


def _read_leading_tags(start: bytes, fetch: Callable[[int], bytes]) -> dict[str, Any]:
    """Return `dicom.read_leading_tags` of a DICOM with a readable header, otherwise nothing."""
    from ray_cxr.imaging import dicom  # slow to import, and PNGs do not need it

    start += fetch(256)  # `looks_like_dicom` needs more than the 132 bytes that tell DICOM from other files
    if dicom.looks_like_dicom(start):
        with contextlib.suppress(ImageError):
            return dicom.read_leading_tags(start, fetch)
    return {}


def _read_tags(data: bytes) -> dict[str, Any] | None:
    """Return `dicom.read_tags` of a DICOM with a readable header, otherwise None."""
    if is_png_or_jpeg(data):
        return None
    from ray_cxr.imaging import dicom  # slow to import, and PNGs do not need it

    with contextlib.suppress(ImageError):
        return dicom.read_tags(data)
    return None


def _serve(requests: int, answers: int) -> None:
    """Answer requests until the parent closes the pipe or ends."""
    settings, _ = _receive(requests)
    specs = [None if spec is None else InputSpec(**spec) for spec in settings["specs"]]
    cv2.setNumThreads(1)  # the parent starts one child per core
    _silence(sys.stderr.fileno())
    _send(answers, {"ready": True}, [])
    while True:
        request, size = _receive(requests)
        data = _read(requests, size)
        # The alarm's default action ends the process, even inside native code.
        signal.setitimer(signal.ITIMER_REAL, settings["alarm_s"])
        images: list[np.ndarray] = []
        if "header" in request:
            answer = _identify(request["path"], data, request["header"], request["digest"])
        else:
            answer, images = _load(request["path"], data, specs, settings)
        _send(answers, answer, [image.data.cast("B") for image in images])
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        del data, images


def _silence(descriptor: int) -> None:
    """Redirect a descriptor to the null device, because decoders may print contents of a file."""
    with open(os.devnull, "r+b", buffering=0) as null:
        os.dup2(null.fileno(), descriptor)


def main() -> None:
    """Run the child with frames on standard input and output, which nothing else can use."""
    requests, answers = os.dup(0), os.dup(1)
    _silence(0)
    _silence(1)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    # No core dump, which would contain a patient's file; a limit of 1 also stops dumps that are piped to a collector.
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    with contextlib.suppress(EOFError):
        _serve(requests, answers)
    os._exit(0)  # without exit handlers of native libraries


if __name__ == "__main__":
    main()
