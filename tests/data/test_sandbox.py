"""Decoding in a child process: the pixels and codes of decoding here, and no file that can do harm beyond its row."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_cxr.config import InputSpec
from ray_cxr.data import imaging, sandbox
from ray_cxr.data.sandbox import Decoder, Failure, Picture
from ray_cxr.errors import ImageError, RayCxrError

sys.path.insert(0, str(Path(__file__).parent))
import test_dicom

SPECS = (InputSpec(size=48), InputSpec(size=64, aspect="pad", interpolation="linear"))

#: What goes wrong in the child, by the first bytes of a file. Python imports a module of this name as it starts.
SITECUSTOMIZE = """
import ctypes, os, signal, sys, time
from ray_cxr.data import imaging

def misbehave(data, **limits):
    word, _, rest = data.partition(b" ")
    if word == b"SEGV":
        ctypes.string_at(0)
    elif word == b"EXIT":
        os._exit(7)
    elif word == b"KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == b"SLEEP":
        time.sleep(600)
    elif word == b"HANG":
        ctypes.PyDLL(None).sleep(600)  # in C, with Python's lock held
    elif word == b"MEMORY":
        raise MemoryError
    elif word == b"STRANGE":
        raise RuntimeError("Doe^Jane")
    elif word == b"JUNK":
        os.write(4, b"Doe^Jane" * 10)  # where the child keeps its standard output
    elif word == b"PRINT":
        print("Doe^Jane")
        print("Doe^Jane", file=sys.stderr)
        os.write(1, b"Doe^Jane")
        os.write(2, b"Doe^Jane")
    elif word == b"ONCE":
        place, _, rest = rest.partition(b" ")
        if not os.path.exists(place):
            open(place, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        rest = data
    return decode(rest, **limits)

decode, imaging.decode = imaging.decode, misbehave
"""


def png_of(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def ramp(height: int = 70, width: int = 90) -> np.ndarray:
    return ((np.arange(height)[:, None] * 3 + np.arange(width)[None, :] * 2) % 256).astype(np.uint8)


GOOD = png_of(ramp())


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(SPECS, tags=True) as one:
        yield one


@pytest.fixture(scope="module")
def broken_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Children that start now misbehave."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def broken(broken_site: None) -> Iterator[Decoder]:
    """A decoder whose child misbehaves, and gives up a file after a second."""
    with Decoder(SPECS, timeout_s=1.0) as one:
        yield one


def pid(one: Decoder) -> int:
    assert one._child is not None
    return one._child._process.pid


def gone(process: int) -> bool:
    """Whether a process has ended; a zombie, which nobody reaps, has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def becomes(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def good(result: Picture | Failure) -> None:
    assert isinstance(result, Picture), result
    for image, spec in zip(result.images, SPECS, strict=True):
        np.testing.assert_array_equal(image, imaging.resize(ramp(), spec))


# ---------------------------------------------------------------- as in-process


def test_pixels_are_those_of_load(decoder: Decoder, tmp_path: Path) -> None:
    file = tmp_path / "ä b.png"
    file.write_bytes(GOOD)
    for source in (str(file), file.as_uri(), GOOD, bytearray(GOOD), memoryview(GOOD)):
        result = decoder.load(source)
        good(result)
        assert isinstance(result, Picture)
        assert result.tags is None
        for image in result.images:
            assert image.dtype == np.uint8
            assert image.flags.c_contiguous
            assert image.flags.writeable
    np.testing.assert_array_equal(result.images[0], imaging.load(str(file), SPECS[0]))


def test_pictures_are_the_callers_own(decoder: Decoder) -> None:
    first = decoder.load(GOOD)
    assert isinstance(first, Picture)
    before = first.images[0].copy()
    decoder.load(png_of(255 - ramp()))
    np.testing.assert_array_equal(first.images[0], before)


def test_path_that_is_no_text(decoder: Decoder, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    Path(name).write_bytes(GOOD)
    good(decoder.load(name))


def test_large_contents(decoder: Decoder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8)
    data = png_of(noise)
    assert len(data) > 2 * sandbox._PIPE_BYTES
    result = decoder.load(data)
    assert isinstance(result, Picture)
    np.testing.assert_array_equal(result.images[0], imaging.resize(noise, SPECS[0]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        GOOD[:-20],
        GOOD[:60] + b"\0" + GOOD[61:],
        png_of(np.full((40, 40), 7, np.uint8)),
        png_of(ramp(20, 90)),
        b"\xff\xd8\xff\xd9",
        bytes(128) + b"DICM",
    ],
)
def test_codes_and_messages_are_those_of_decode(decoder: Decoder, data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        imaging.decode(data)
    result = decoder.load(data)
    assert isinstance(result, Failure)
    assert (result.code, result.message) == (caught.value.code, caught.value.message)


def test_codes_of_files(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "empty.png", "", "a\0b", "nothing://a/b.png"):
        with pytest.raises(ImageError) as caught:
            imaging.load(str(path))
        assert decoder.load(str(path)) == Failure(caught.value.code, caught.value.message, None)


@pytest.mark.parametrize("source", [None, float("nan")])
def test_no_path_is_missing(decoder: Decoder, source: None) -> None:
    assert decoder.load(source) == Failure("missing", "there is no path", None)


def test_limit_of_pixels() -> None:
    with Decoder(SPECS, max_pixels=1000) as one:
        result = one.load(GOOD)
    assert result == Failure("too_large", "70 x 90 pixels; the limit is 1000", None)


def test_tags_of_a_dicom(decoder: Decoder) -> None:
    data = test_dicom.file_of(ramp(), PatientAge="058Y", PatientSex="F", ViewPosition="PA", StudyInstanceUID="1.2.3")
    tags = {"patient_id": "Doe^Jane", "study_id": "1.2.3", "age": 58.0, "sex": "F", "view": "PA"}
    result = decoder.load(data)
    good(result)
    assert result.tags == tags
    cut = decoder.load(data[:-100])
    assert isinstance(cut, Failure)
    assert (cut.code, cut.tags) == ("truncated", tags)
    assert "Doe" not in cut.message
    assert decoder.load(data[:140]).tags is None


def test_tags_are_read_where_they_are_asked_for() -> None:
    with Decoder(SPECS) as one:
        result = one.load(test_dicom.file_of(ramp()))
        good(result)
        assert result.tags is None


def test_real_files(shared: Path, decoder: Decoder) -> None:
    paths = [*sorted((shared / "nih" / "images1024").iterdir())[::30], *sorted((shared / "dicom").iterdir())]
    for path in paths:
        result = decoder.load(str(path))
        assert isinstance(result, Picture)
        np.testing.assert_array_equal(result.images[0], imaging.load(str(path), SPECS[0]))
        assert (result.tags is not None) == (path.suffix == ".dcm")


def test_several_at_once() -> None:
    pictures = [np.roll(ramp(), shift) for shift in range(40)]
    files = [png_of(picture) for picture in pictures]
    wrong: list[object] = []

    def work() -> None:
        with Decoder(SPECS) as one:
            for picture, data in zip(pictures, files, strict=True):
                result = one.load(data)
                if not isinstance(result, Picture) or not np.array_equal(
                    result.images[0], imaging.resize(picture, SPECS[0])
                ):
                    wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- files that do harm


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"SEGV", "the decoder process ended with SIGSEGV"),
        (b"KILL", "the decoder process ended with SIGKILL"),
        (b"EXIT", "the decoder process ended with exit code 7"),
        (b"JUNK", "the decoder process ended with an answer that cannot be read"),
    ],
)
def test_crash_costs_its_row(broken: Decoder, contents: bytes, message: str) -> None:
    assert broken.load(contents) == Failure("decoder_crash", message, None)
    good(broken.load(GOOD))


@pytest.mark.parametrize("contents", [b"SLEEP", b"HANG"])
def test_file_that_never_ends_costs_its_row(broken: Decoder, contents: bytes) -> None:
    broken.load(GOOD)
    begun, process = time.monotonic(), pid(broken)
    assert broken.load(contents) == Failure("decode_timeout", "not read and decoded within 1 s", None)
    assert 0.9 < time.monotonic() - begun < 20.0
    assert gone(process)
    good(broken.load(GOOD))


def test_stopped_child_is_a_timeout(broken: Decoder) -> None:
    broken.load(GOOD)
    os.kill(pid(broken), signal.SIGSTOP)
    result = broken.load(b"x" * 3 * sandbox._PIPE_BYTES)  # more than fits into the pipe that nobody reads
    assert isinstance(result, Failure)
    assert result.code == "decode_timeout"


def test_no_memory_is_too_large(broken: Decoder) -> None:
    assert broken.load(b"MEMORY") == Failure("too_large", "the image decoder ran out of memory", None)


def test_foreign_error_is_corrupt(broken: Decoder) -> None:
    assert broken.load(b"STRANGE") == Failure("corrupt", "the image decoder failed (RuntimeError)", None)


def test_child_killed_between_files_blames_none(broken: Decoder) -> None:
    broken.load(GOOD)
    os.kill(pid(broken), signal.SIGKILL)
    good(broken.load(GOOD))


def test_child_killed_once_over_a_file_blames_it_not(broken: Decoder, tmp_path: Path) -> None:
    good(broken.load(b"ONCE %s %s" % (os.fsencode(tmp_path / "mark"), GOOD)))
    assert (tmp_path / "mark").exists()


def test_nothing_is_printed(broken_site: None, capfd: pytest.CaptureFixture[str]) -> None:
    with Decoder(SPECS) as one:
        good(one.load(b"PRINT " + GOOD))
        assert {os.readlink(f"/proc/{pid(one)}/fd/{stream}") for stream in range(3)} == {os.devnull}
        one.load(b"SEGV")
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- the child's life


def test_child_starts_when_it_is_told_or_needed() -> None:
    one = Decoder(SPECS)
    assert one._child is None
    one.start()
    process = pid(one)
    one.start()
    good(one.load(GOOD))
    good(one.load(GOOD))
    assert pid(one) == process
    one.close()
    one.close()
    assert gone(process)
    good(one.load(GOOD))
    one.close()


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    one = Decoder(SPECS)
    one.load(GOOD)
    one.close()
    before = descriptors()
    one.load(GOOD)
    process = pid(one)
    del one  # without `close`
    assert gone(process)
    assert descriptors() == before


def test_interrupted_load_leaves_no_answer_for_the_next_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with Decoder(SPECS) as one:
        one.load(GOOD)
        with monkeypatch.context() as patch:
            patch.setattr(sandbox._Child, "read_into", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.load(png_of(255 - ramp()))
        good(one.load(GOOD))


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_timeout_must_be_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be positive and finite, got"):
        Decoder(SPECS, timeout_s=seconds)


def test_interrupt_from_the_keyboard_is_the_parents(decoder: Decoder) -> None:
    decoder.load(GOOD)
    process = pid(decoder)
    os.kill(process, signal.SIGINT)
    good(decoder.load(GOOD))
    assert pid(decoder) == process


def test_module_in_the_working_directory_is_not_the_childs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    (tmp_path / "a.png").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    with Decoder(SPECS) as one:
        good(one.load("a.png"))


def test_child_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoder(SPECS) as one, pytest.raises(RayCxrError) as caught:
        one.load(GOOD)
    assert str(caught.value).startswith(
        "the decoder process cannot start (exit code 1: ImportError: libGL.so.1: no such file); see what `"
    )
    assert "\n" not in str(caught.value)


def test_no_python_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with Decoder(SPECS) as one, pytest.raises(RayCxrError, match=r"cannot start \(No such file or directory\)"):
        one.load(GOOD)


def test_child_killed_while_it_starts_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, signal\nif not os.path.exists({str(mark)!r}):\n    open({str(mark)!r}, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoder(SPECS) as one:
        good(one.load(GOOD))
    assert mark.exists()


@pytest.mark.parametrize("contents", ["", "HANG"])
def test_child_ends_with_its_parent(broken_site: None, contents: str) -> None:
    program = textwrap.dedent(f"""
        import sys, threading
        from ray_cxr.config import InputSpec
        from ray_cxr.data import sandbox
        sandbox._ALARM_MARGIN_S = -598.0
        one = sandbox.Decoder([InputSpec()], timeout_s=600.0)
        one.load(b"text")
        print(one._child._process.pid, flush=True)
        if {contents!r}:
            one.load({contents.encode()!r})
        threading.Event().wait()
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        if contents:
            time.sleep(0.3)
    finally:
        parent.kill()
        with contextlib.closing(parent.stdout):
            parent.wait()
    assert becomes(lambda: gone(child))
