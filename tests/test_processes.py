"""What child processes inherit: no module of the working directory, and short paths of Ray's sockets."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import ray_cxr
from ray_cxr import processes
from ray_cxr.config import InputSpec
from ray_cxr.errors import RayCxrError
from ray_cxr.imaging.sandbox import DecodedImage, Decoder

ROOT = str(Path(ray_cxr.__file__).parents[1])


def test_the_module_path_has_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/opt/x", ".", "lib", str(tmp_path), f"{tmp_path}/", "/opt/y", "/opt/x"])
    assert processes.build_module_path() == f"/opt/x:{tmp_path}/lib:/opt/y:{ROOT}"
    # A checkout that is not installed is itself the working directory.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", ROOT, "/opt/x"])
    assert processes.build_module_path() == f"/opt/x:{ROOT}"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert processes.build_module_path() == f"{ROOT}:/opt/x"


@pytest.mark.parametrize("entry", ["", "folder"])
def test_the_decoder_imports_nothing_from_the_working_directory(
    entry: str, phantoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "random", "statistics", "cv2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if entry else "", *sys.path])
    image = min(Path(phantoms.images).rglob("*.png"))
    with Decoder([InputSpec()]) as decoder:
        assert isinstance(decoder.load(str(image)), DecodedImage)


@pytest.fixture
def short_parent(monkeypatch: pytest.MonkeyPatch):
    """A folder with a short path, in place of /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    monkeypatch.setattr(processes, "_SHORT_PARENTS", (str(folder),))
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("length", [32, 33, 300])
def test_a_long_temporary_folder_gets_a_short_link(
    variable: str, length: int, short_parent: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """Ray's session adds 71 bytes to the folder `ray` in TMPDIR, and the path of a socket has at most 107."""
    folder = Path(f"{short_parent}{('/' + 'x' * 99) * 3}"[:length])
    folder.mkdir(parents=True)
    monkeypatch.setenv(variable, str(folder))
    with caplog.at_level(logging.INFO), processes.provide_ray_folder() as found:
        (Path(found) / "session").mkdir()
        assert (folder / "ray" / "session").is_dir()
        assert len(found) <= 36
        assert (found == f"{folder}/ray") == (length == 32)
    assert caplog.messages == [] if length == 32 else caplog.messages[0].startswith(f"Ray's sockets are in {found},")
    assert length == 32 or f"{variable}={folder} is too long for them ({length + 4} bytes" in caplog.messages[0]
    assert list(short_parent.glob("ray_cxr-*")) == []
    assert (folder / "ray" / "session").is_dir(), "Ray's logs stay"


@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_temporary_folder_is_not_the_working_directory(
    value: str | None, short_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_parent)
    if value is not None:
        monkeypatch.setenv("TMPDIR", value)
    with processes.provide_ray_folder() as found:
        assert found == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "relative")
    with processes.provide_ray_folder() as found:
        assert found == f"{short_parent}/relative/ray"


@pytest.mark.parametrize("kind", ["file", "foreign"])
def test_a_temporary_folder_that_cannot_be_written_is_replaced(
    kind: str, short_parent: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    folder = short_parent / "t"
    folder.write_text("") if kind == "file" else folder.mkdir()
    if kind == "foreign":
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(folder)))
    monkeypatch.setenv("TMPDIR", str(folder))
    reason = "Not a directory" if kind == "file" else f"{folder}/ray belongs to another user"
    with caplog.at_level(logging.INFO), processes.provide_ray_folder() as found:
        assert Path(found).is_dir()
        assert Path(found).parent.parent == short_parent
        assert Path(found).parent.stat().st_mode & 0o777 == 0o700
    assert caplog.messages == [f"Ray's sockets are in {found}, because TMPDIR={folder} cannot be used ({reason})"]
    assert not Path(found).parent.exists()


def test_a_machine_without_a_short_folder_is_one_line(short_parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = short_parent / ("long" * 20)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder))
    monkeypatch.setattr(processes, "_SHORT_PARENTS", (str(short_parent / "none"),))
    words = r"TMPDIR=.*longlong.* set RAY_TMPDIR to a writable folder of at most 32"
    with pytest.raises(RayCxrError, match=words), processes.provide_ray_folder():
        pass
    assert [path.name for path in folder.iterdir()] == ["ray"]


@pytest.mark.slow
def test_children_of_a_command_import_nothing_from_the_working_directory(tmp_path: Path) -> None:
    """`export-sr` starts its processes with `python -c`, for which Python adds the working directory."""
    (tmp_path / "socket.py").write_text("raise SystemExit('a module of the user')")
    script = tmp_path / "app" / "run.py"
    script.parent.mkdir()
    script.write_text(
        "import concurrent.futures as futures, contextlib, multiprocessing, ray_cxr.__main__\n"
        "if __name__ == '__main__':\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        ray_cxr.__main__.main(['--version'])\n"
        "    pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))\n"
        "    print(pool.submit(len, 'abc').result())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("3\n"), done.stderr
