"""Decoding in a child process: same pixels and codes as in this process, and a harmful file costs only its row."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.config import InputSpec
from ray_cxr.errors import ImageError, RayCxrError
from ray_cxr.evaluation import quality
from ray_cxr.imaging import sandbox
from ray_cxr.imaging.decode import HEADER_FLAGS, decode, load_image
from ray_cxr.imaging.resize import resize
from ray_cxr.imaging.sandbox import DecodedImage, Decoder, Failure

sys.path.insert(0, str(Path(__file__).parent))
import test_dicom
from test_decode import png_of, ramp

SPECS = (InputSpec(size=48), InputSpec(size=64, aspect="pad", interpolation="linear"))

#: Makes a child run the Python code at the start of a file, before it decodes the rest of it (see `harmful`). Python
#: imports a module of this name when it starts.
SITECUSTOMIZE = """
import ctypes, os, signal, sys
from ray_cxr.imaging import decode as decoding

def misbehave(data, **limits):
    if data.startswith(b"RUN "):
        code, _, data = data[4:].partition(b"\\0")
        exec(code)
    return decode(data, **limits)

decode, decoding.decode_with_flags = decoding.decode_with_flags, misbehave
"""
SEGV = "ctypes.string_at(0)"
#: Answers like a child whose memory was corrupted: plausible apart from one flag.
UNKNOWN_FLAG = """
import json, struct
answer = json.dumps({"tags": None, "shape": [70, 90], "flags": ["reoriented", "Doe^Jane"]}).encode()
os.write(4, struct.pack("<IQ", len(answer), 48 * 48 + 64 * 64) + answer + bytes(48 * 48 + 64 * 64))
"""


def harmful(code: str, image: bytes = b"") -> bytes:
    """The contents of a file that makes the child run `code`."""
    return b"RUN " + code.encode() + b"\0" + image


def hanging(mark: Path) -> bytes:
    """The contents of a file that makes the child hang in C, with Python's lock held, after it has written `mark`."""
    return harmful(f"open({str(mark)!r}, 'w').close(); ctypes.PyDLL(None).sleep(600)")


RAMP = ramp(70, 90)
GOOD = png_of(RAMP)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(SPECS, tags=True) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def broken_decoder(tmp_path_factory) -> Iterator[Decoder]:
    """A decoder whose child misbehaves, as all that start now."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    with pytest.MonkeyPatch.context() as patch, Decoder(SPECS) as decoder:
        patch.syspath_prepend(str(folder))
        yield decoder


def pid(decoder: Decoder) -> int:
    assert decoder._child is not None
    return decoder._child.process.pid


def has_ended(process: int) -> bool:
    """Whether a process has ended; so has a zombie that no parent reaps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_good(result: DecodedImage | Failure, image: np.ndarray | None = None) -> DecodedImage:
    assert isinstance(result, DecodedImage), result
    for found, spec in zip(result.images, SPECS, strict=True):
        np.testing.assert_array_equal(found, resize(RAMP if image is None else image, spec))
    return result


def test_pixels_are_those_of_load(decoder: Decoder, tmp_path: Path) -> None:
    plain, foreign = tmp_path / "ä b.png", Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))
    for file in (plain, foreign):
        file.write_bytes(GOOD)
    for source in (str(plain), plain.as_uri(), str(foreign), GOOD, bytearray(GOOD), memoryview(GOOD)):
        result = assert_good(decoder.load(source))
        assert (result.tags, result.shape) == (None, (70, 90))
        for image in result.images:
            assert (image.dtype, image.flags.c_contiguous, image.flags.writeable) == (np.uint8, True, True)
    np.testing.assert_array_equal(result.images[0], load_image(str(plain), SPECS[0]))
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8)
    data = png_of(noise)
    assert len(data) > 2 * sandbox._PIPE_BYTES
    assert_good(decoder.load(data), noise)
    assert_good(result)  # the caller's own: later files do not change it


def test_image_in_its_own_size() -> None:
    with Decoder([None, SPECS[0]]) as decoder:
        result = decoder.load(GOOD)
        assert isinstance(result, DecodedImage)
        np.testing.assert_array_equal(result.images[0], RAMP)
        np.testing.assert_array_equal(result.images[1], resize(RAMP, SPECS[0]))
        assert decoder.load(b"text") == Failure("not_an_image", "the contents are neither PNG, JPEG nor DICOM", None)


def test_codes_and_messages_are_those_of_this_process(decoder: Decoder, tmp_path: Path) -> None:
    for data in (b"", b"text", GOOD[:-20], png_of(np.full((40, 40), 7, np.uint8)), bytes(128) + b"DICM"):
        with pytest.raises(ImageError) as caught:
            decode(data)
        result = decoder.load(data)
        assert isinstance(result, Failure)
        assert (result.code, result.message) == (caught.value.code, caught.value.message)
    (tmp_path / "empty.png").touch()
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "empty.png", "", "a\0b", "nothing://a/b.png"):
        with pytest.raises(ImageError) as caught:
            load_image(str(path))
        assert decoder.load(str(path)) == Failure(caught.value.code, caught.value.message, None)
    for no_path in (None, float("nan")):
        assert decoder.load(no_path) == Failure("missing", "the row has no path", None)


def test_tags_of_a_dicom(decoder: Decoder) -> None:
    data = test_dicom.file_of(RAMP, PatientAge="058Y", PatientSex="F", ViewPosition="PA", StudyInstanceUID="1.2.3")
    tags = {"patient_id": "Doe^Jane", "study_id": "1.2.3", "age": 58.0, "sex": "F", "view": "PA"}
    tags["sop_instance_uid"] = "1.2.3.4"
    assert assert_good(decoder.load(data)).tags == tags
    cut = decoder.load(data[:-100])
    assert isinstance(cut, Failure)
    assert (cut.code, cut.tags) == ("truncated", tags)
    assert "Doe" not in cut.message
    assert decoder.load(data[:140]).tags is None


def test_pixel_limit_and_no_tags_by_default() -> None:
    with Decoder(SPECS, max_pixels=32 * 32) as decoder:
        assert assert_good(decoder.load(test_dicom.file_of(ramp(32, 32))), ramp(32, 32)).tags is None
        assert decoder.load(GOOD) == Failure("too_large", "70 x 90 pixels; the limit is 1024", None)


@pytest.mark.slow
def test_harmful_file_costs_its_row(broken_decoder: Decoder) -> None:
    for program, code, message in (
        (SEGV, "decoder_crash", "SIGSEGV"),
        ("os._exit(7)", "decoder_crash", "exit code 7"),
        # The child keeps its standard output as descriptor 4.
        ("os.write(4, b'Doe^Jane' * 10)", "decoder_crash", "an unreadable answer"),
        (UNKNOWN_FLAG, "decoder_crash", "an unreadable answer"),
        ("raise MemoryError", "too_large", "out of memory"),
        ("raise RuntimeError('Doe^Jane')", "corrupt", "RuntimeError"),
    ):
        result = broken_decoder.load(harmful(program))
        assert isinstance(result, Failure)
        assert (result.code, result.tags, message in result.message) == (code, None, True)
        assert "Doe" not in result.message
        assert_good(broken_decoder.load(GOOD))


def test_flags_of_headers_are_those_that_pixels_and_ages_do_not_set() -> None:
    """A flag of a header that is missing in the list would cost every image that has it."""
    assert set(quality.FLAGS) - HEADER_FLAGS == {"inverted", "lateral", "out_of_distribution", "age_outside_training"}
    assert set(quality.FLAGS) >= HEADER_FLAGS


@pytest.mark.parametrize("kind", ["hanging decoder", "stopped child"])
def test_file_that_never_ends_costs_its_row(broken_decoder: Decoder, tmp_path: Path, monkeypatch, kind: str) -> None:
    assert_good(broken_decoder.load(GOOD))  # the child is ready before the timeout is short
    monkeypatch.setattr(broken_decoder, "_timeout_s", 0.3)
    process = pid(broken_decoder)
    contents = hanging(tmp_path / "mark")
    if kind == "stopped child":
        os.kill(process, signal.SIGSTOP)
        contents = b"x" * 3 * sandbox._PIPE_BYTES  # more than the pipe holds while the child does not read
    assert broken_decoder.load(contents) == Failure("decode_timeout", "not read and decoded within 0.3 s", None)
    assert has_ended(process)
    monkeypatch.undo()
    assert_good(broken_decoder.load(GOOD))


@pytest.mark.slow
def test_child_killed_by_others_costs_no_row(broken_decoder: Decoder, tmp_path: Path) -> None:
    """Killed once between two files, and once while it decodes one: both times the file gets a second child."""
    broken_decoder.load(GOOD)
    os.kill(pid(broken_decoder), signal.SIGKILL)
    assert_good(broken_decoder.load(GOOD))
    mark = tmp_path / "mark"
    once = f"mark = {str(mark)!r}\nif not os.path.exists(mark): open(mark, 'w').close(); os.kill(os.getpid(), 9)"
    assert_good(broken_decoder.load(harmful(once, GOOD)))
    assert mark.exists()


def test_nothing_is_printed(broken_decoder: Decoder, capfd) -> None:
    assert_good(broken_decoder.load(harmful("print('Doe^Jane', file=sys.stderr); os.write(1, b'Doe^Jane')", GOOD)))
    assert {os.readlink(f"/proc/{pid(broken_decoder)}/fd/{stream}") for stream in range(3)} == {os.devnull}
    broken_decoder.load(harmful(SEGV))
    assert capfd.readouterr() == ("", "")


def test_child_lives_from_start_to_close(tmp_path: Path, monkeypatch) -> None:
    """It starts once, ignores Ctrl-C and modules in the working directory, and leaves no process and no pipe."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    (tmp_path / "a.png").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    decoder = Decoder(SPECS)
    assert decoder._child is None
    decoder.start()
    process = pid(decoder)
    decoder.start()
    assert_good(decoder.load("a.png"))
    os.kill(process, signal.SIGINT)
    assert_good(decoder.load(GOOD))
    assert pid(decoder) == process

    # After an interrupt the next file does not get the answer to this one.
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_read_into", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.load(png_of(255 - RAMP))
    assert has_ended(process)
    assert_good(decoder.load(GOOD))

    process = pid(decoder)
    pipes = {os.readlink(f"/proc/self/fd/{end}") for end in (decoder._child.requests, decoder._child.answers)}
    del decoder  # without `close`
    assert has_ended(process)
    for end in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            assert os.readlink(f"/proc/self/fd/{end}") not in pipes


def test_child_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoder(SPECS) as decoder, pytest.raises(RayCxrError, match=r"ImportError: libGL\.so\.1") as caught:
        decoder.load(GOOD)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "executable", "/no/python")
    with Decoder(SPECS) as decoder, pytest.raises(RayCxrError, match="No such file"):
        decoder.load(GOOD)


def test_child_killed_while_it_starts_is_started_again(tmp_path: Path, monkeypatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, signal\nif not os.path.exists({str(mark)!r}):\n    open({str(mark)!r}, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoder(SPECS) as decoder:
        assert_good(decoder.load(GOOD))
    assert mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.usefixtures("broken_decoder")
def test_child_ends_with_its_parent(tmp_path: Path, hangs: bool) -> None:
    """At the end of its input; where native code hangs, by its own alarm after one second."""
    mark = tmp_path / "mark"
    program = textwrap.dedent(f"""
        from ray_cxr.config import InputSpec
        from ray_cxr.imaging import sandbox
        sandbox._ALARM_MARGIN_S = -599.0
        decoder = sandbox.Decoder([InputSpec()], timeout_s=600.0)
        decoder._start_and_wait()
        print(decoder._child.process.pid, flush=True)
        if {hangs}:
            decoder.load({hanging(mark)!r})
        input()
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as parent:
        try:
            child = int(parent.stdout.readline())
            assert not has_ended(child)
            wait_until(lambda: mark.exists() or not hangs)
        finally:
            parent.kill()
    wait_until(lambda: has_ended(child))
