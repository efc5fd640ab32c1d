"""Reading and decoding in a child process: a crash of native code, or a file that never ends, costs one row.

    parent                                    child: python -m ray_cxr.imaging.sandbox
    Decoder.load(path or contents)  -- stdin -->  read_bytes, decode, read_tags, resize
    DecodedImage | Failure               <- stdout --  pixels, or a code and a message

Both directions carry frames: the lengths of the two parts that follow, a JSON object, raw bytes. The child runs
what `imaging` runs, so pixels and codes are those of decoding in-process. What decoders print goes to the null
device.

The child ends with its parent: at the end of its standard input, or, where native code hangs, by an alarm that is
set anew for each file.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import cv2
import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.errors import ERROR_CODES, ImageError, RayCxrError
from ray_cxr.imaging.decode import decode, is_png_or_jpeg
from ray_cxr.imaging.pixels import MAX_PIXELS, decoder_errors
from ray_cxr.imaging.resize import resize
from ray_cxr.storage.files import read_bytes

#: How long a child may take until it is ready, seconds: mostly imports, on a machine that may be busy.
START_TIMEOUT_S = 120.0
_STARTS = 3  # of a child that is killed while it starts
#: The child's own alarm rings this much later than the parent's patience ends, seconds.
_ALARM_MARGIN_S = 10.0
_PIPE_BYTES = 1024 * 1024  # holds a whole NIH file, so that it needs no second turn
_READ_AT_ONCE = 64 * 1024 * 1024
_FRAME = struct.Struct("<IQ")  # bytes of JSON, raw bytes
_MAX_JSON = 16 * 1024 * 1024
_ALARM = signal.SIGALRM.name
_NONSENSE = "an answer that cannot be read"


@dataclass(frozen=True)
class DecodedImage:
    """One radiograph: uint8[S, S] per spec, in the order of the specs, each the caller's own; uint8[H, W] for None.

    `tags` are `dicom.read_tags` of a DICOM where they were asked for, else None; `shape` is height and width in pixels
    before the resize, None where nobody told.
    """

    images: tuple[np.ndarray, ...]
    tags: Mapping[str, Any] | None
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no picture: `code` and `message` as of an `ImageError`; `tags` where the header could be read."""

    code: str
    message: str
    tags: Mapping[str, Any] | None


class Decoder:
    """One child process that reads, decodes and resizes; for one thread at a time.

    The child starts with `start` or the first `load`, and anew after it was lost.

    Args:
        specs: the sizes to make of each image; None for its own size.
        max_pixels: larger pictures are refused before they are decoded.
        timeout_s: a file that takes longer, reading included, is given up.
        tags: read the header fields of DICOM files, too.

    Attributes:
        seconds: what the last `load` took, the start of a child left out; 0 where there was nothing to read.

    Raises:
        ValueError: a timeout that is not positive and finite.
    """

    def __init__(
        self,
        specs: Sequence[InputSpec | None],
        *,
        max_pixels: int = MAX_PIXELS,
        timeout_s: float = 60.0,
        tags: bool = False,
    ) -> None:
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s must be positive and finite, got {timeout_s}")
        self._specs = tuple(specs)
        self._timeout_s = float(timeout_s)
        self._max_pixels = max_pixels
        self._settings = {
            "specs": [None if spec is None else spec.model_dump() for spec in self._specs],
            "max_pixels": max_pixels,
            "alarm_s": self._timeout_s + _ALARM_MARGIN_S,
            "tags": tags,
        }
        self.seconds = 0.0
        self._child: _Child | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Start the child without waiting for it; nothing to do where one runs already.

        Raises:
            RayCxrError: the system starts no process.
        """
        if self._child is not None and self._child.alive():
            return
        self.close()
        self._child = _Child(self._settings)
        # Where nobody calls `close`, too: no child stays behind, and Popen does not warn of one.
        self._finalizer = weakref.finalize(self, self._child.kill)

    def load(self, source: str | bytes | None) -> DecodedImage | Failure:
        """Read, decode and resize one radiograph.

        A child that is lost over a file may have been killed for another reason, so the file gets a second one;
        losing that as well is `decoder_crash`.

        Args:
            source: a path or URI for `storage.read_bytes`, the contents of a file, or None (`missing`).

        Returns:
            A `DecodedImage`, or a `Failure` with any code of `imaging.load`, `decode_timeout` or `decoder_crash`.

        Raises:
            RayCxrError: the child cannot be started, whatever the file.
        """
        request: dict[str, Any] = {}
        body: bytes | memoryview = b""
        self.seconds = 0.0
        if isinstance(source, (bytes, bytearray, memoryview)):
            body = source if isinstance(source, bytes) else memoryview(source).cast("B")
        elif isinstance(source, (str, os.PathLike)):
            request["path"] = os.fspath(source)
        else:
            return Failure("missing", "there is no path", None)
        how = ""
        for _ in range(2):
            child = self._ready()
            begun = time.monotonic()
            deadline = begun + self._timeout_s
            try:
                child.send(request, body, deadline)
                return self._answer(child, deadline)
            except TimeoutError:
                how = _ALARM
            except EOFError as lost:
                how = str(lost) or child.outcome()
            except BaseException:  # an interrupt: the answer to this file must not become the next one's
                self.close()
                raise
            finally:
                self.seconds += time.monotonic() - begun
            self.close()
            if how == _ALARM:  # this process may have slept for longer than the child's own alarm
                return Failure("decode_timeout", f"not read and decoded within {self._timeout_s:g} s", None)
        return Failure("decoder_crash", f"the decoder process ended with {how}", None)

    def close(self) -> None:
        """End the child; a later `load` starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._child = self._finalizer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ready(self) -> _Child:
        """A child that has said that it is ready: only then can its death be a file's fault."""
        reason = ""
        for _ in range(_STARTS):
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
                reason = str(lost) or child.outcome()
                by_itself = not reason.startswith("SIG")
                if words := child.last_words():
                    reason = f"{reason}: {words}"
                if by_itself:  # and would again
                    break
            finally:
                if not child.ready:
                    self.close()
        raise RayCxrError(
            f"the decoder process cannot start ({reason}); see what `{sys.executable} -m ray_cxr.imaging.sandbox` says"
        )

    def _answer(self, child: _Child, deadline: float) -> DecodedImage | Failure:
        try:
            answer, size = child.receive(deadline)
            if "code" in answer:
                if size or answer["code"] not in ERROR_CODES:
                    raise EOFError(_NONSENSE)
                return Failure(answer["code"], answer["message"], answer["tags"])
            tags = answer["tags"]
            height, width = map(int, answer["shape"])
            shapes = [(height, width) if spec is None else (spec.size, spec.size) for spec in self._specs]
            possible = height > 0 and 0 < height * width <= self._max_pixels
            if not possible or size != sum(rows * columns for rows, columns in shapes):
                raise EOFError(_NONSENSE)
        except (ValueError, KeyError, TypeError):  # native code wrote over the child's memory
            raise EOFError(_NONSENSE) from None
        images = tuple(np.empty(shape, np.uint8) for shape in shapes)
        for image in images:
            child.read_into(image.data.cast("B"), deadline)
        return DecodedImage(images, tags, (height, width))


class _Child:
    """A process and its two pipes. TimeoutError: the deadline has passed. EOFError: the process is lost, or useless."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.ready = False
        # Says why a child does not start. Before a child is ready it has seen no file, and then it shuts this.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                # -P: `python -m` looks into the working directory first, which may hold a numpy.py of the user's.
                [sys.executable, "-P", "-W", "ignore", "-m", "ray_cxr.imaging.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                env=_environment(),
            )
        except OSError as error:
            self._stderr.close()
            raise RayCxrError(f"the decoder process cannot start ({error.strerror or type(error).__name__})") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._requests, self._answers):
            os.set_blocking(pipe.fileno(), False)
            _widen(pipe.fileno())
        with contextlib.suppress(EOFError, TimeoutError):  # noticed at the first answer
            self.send(settings, b"", time.monotonic() + START_TIMEOUT_S)

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, deadline: float) -> None:
        try:
            self.receive(deadline)
        except ValueError:
            raise EOFError(_NONSENSE) from None
        self._stderr.close()
        self.ready = True

    def send(self, header: Mapping[str, Any], body: bytes | memoryview, deadline: float) -> None:
        _send(self._requests.fileno(), header, [body], deadline)

    def receive(self, deadline: float) -> tuple[dict[str, Any], int]:
        """The JSON object of a frame, and the number of raw bytes after it, which stay in the pipe."""
        head = bytearray(_FRAME.size)
        self.read_into(memoryview(head), deadline)
        length, size = _FRAME.unpack(head)
        if length > _MAX_JSON:
            raise EOFError(_NONSENSE)
        text = bytearray(length)
        self.read_into(memoryview(text), deadline)
        return json.loads(text), size

    def read_into(self, view: memoryview, deadline: float) -> None:
        """Fill a view of bytes."""
        descriptor = self._answers.fileno()
        while view:
            _wait(descriptor, select.POLLIN, deadline)
            try:
                count = os.readv(descriptor, [view])
            except BlockingIOError:
                continue
            if not count:
                raise EOFError
            view = view[count:]

    def outcome(self) -> str:
        """How a process ended that has shut its pipe: the name of a signal, or `exit code 1`."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # the end is near
            self._process.wait(1.0)
        code = self._process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"SIGRTMIN+{-code - signal.SIGRTMIN}"  # the one kind that has no name of its own

    def last_words(self) -> str:
        """The last line that it wrote before it was ready, shortened."""
        self._stderr.seek(0)
        lines = self._stderr.read()[-4096:].decode(errors="replace").split("\n")
        return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")

    def kill(self) -> None:
        """End and reap it; more than once does no harm."""
        self._process.kill()
        self._requests.close()
        self._answers.close()
        self._stderr.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a dead network disk holds even a killed process
            self._process.wait(5.0)


def _environment() -> dict[str, str]:
    """This process's own, with the modules it finds: under Ray they can lie in a working_dir."""
    path = [os.path.abspath(entry) for entry in sys.path]
    root = str(Path(__file__).parents[2])
    if root not in path:
        path.append(root)
    # The libraries' thread pools cost a start its time, and decoding has no use for them.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _widen(pipe: int) -> None:
    """Make room in a pipe, where the system can (Linux) and lets us."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Until a pipe can be read or written or has lost its other end.

    Raises:
        TimeoutError: not before the deadline.
    """
    poll = select.poll()
    poll.register(descriptor, event)
    while not poll.poll(min(max(0.0, deadline - time.monotonic()), 3600.0) * 1000.0):  # it takes no more than 2^31 ms
        if time.monotonic() >= deadline:
            raise TimeoutError


def _send(
    descriptor: int, header: Mapping[str, Any], body: Sequence[bytes | memoryview], deadline: float = float("inf")
) -> None:
    """Write a frame.

    Raises:
        EOFError: nobody reads.
        TimeoutError: not before the deadline.
    """
    text = json.dumps(header).encode()
    views = [memoryview(part) for part in body]
    views = [memoryview(_FRAME.pack(len(text), sum(map(len, views))) + text), *views]
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


def _read(descriptor: int, size: int) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: the parent is gone.
    """
    parts: list[bytes] = []
    while size:
        part = os.read(descriptor, min(size, _READ_AT_ONCE))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _receive(descriptor: int) -> tuple[dict[str, Any], bytes]:
    length, size = _FRAME.unpack(_read(descriptor, _FRAME.size))
    return json.loads(_read(descriptor, length)), _read(descriptor, size)


def _load(
    path: str | None, data: bytes, specs: Sequence[InputSpec | None], max_pixels: int, tags: bool
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The JSON object and the pixels of an answer."""
    found: dict[str, Any] | None = None
    try:
        with decoder_errors("image"):  # what is left: no memory to resize, or a decoder's print that fails
            if path is not None:
                data = read_bytes(path)
            if tags:
                found = _tags(data)
            image = decode(data, max_pixels=max_pixels)
            images = [image if spec is None else resize(image, spec) for spec in specs]
            return {"tags": found, "shape": image.shape}, images
    except ImageError as error:
        return {"code": error.code, "message": error.message, "tags": found}, []


def _tags(data: bytes) -> dict[str, Any] | None:
    """`dicom.read_tags` where the data are a DICOM whose header can be read, else None."""
    if not data or is_png_or_jpeg(data):
        return None
    from ray_cxr.imaging import dicom  # slow to import, and an archive of PNGs never needs it

    try:
        return dicom.read_tags(data) if dicom.looks_like_dicom(data) else None
    except ImageError:
        return None


def _serve(requests: int, answers: int) -> None:
    """Answer requests until the parent closes the pipe or is gone."""
    settings, _ = _receive(requests)
    specs = [None if spec is None else InputSpec(**spec) for spec in settings["specs"]]
    cv2.setNumThreads(1)  # the parent starts as many children as there are cores to use
    _shut(sys.stderr.fileno())
    _send(answers, {"ready": True}, [])
    while True:
        request, data = _receive(requests)
        # The alarm's default action ends the process, whatever native code is doing.
        signal.setitimer(signal.ITIMER_REAL, settings["alarm_s"])
        answer, images = _load(request.get("path"), data, specs, settings["max_pixels"], settings["tags"])
        _send(answers, answer, [image.data.cast("B") for image in images])
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        del data, images


def _shut(descriptor: int) -> None:
    """Lead a descriptor to the null device: decoders print, and what they print can be a file's contents."""
    with open(os.devnull, "r+b", buffering=0) as null:
        os.dup2(null.fileno(), descriptor)


def main() -> None:
    """The child: frames come by standard input and go by standard output, which nothing else can reach."""
    requests, answers = os.dup(0), os.dup(1)
    _shut(0)
    _shut(1)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    # No memory image, which would hold a patient's file; a limit of 1 also stops one that is piped to a collector.
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    with contextlib.suppress(EOFError):
        _serve(requests, answers)
    os._exit(0)  # without the farewells of native libraries


if __name__ == "__main__":
    main()
