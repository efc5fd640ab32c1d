"""Test malicious files that try to run code, read other files, exhaust memory or leave their folder.

See also tests/storage (archives), tests/imaging, tests/models/test_bundle.py, tests/test_architecture.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import ray_cxr
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.labels import FINDINGS
from ray_cxr.models import bundle as bundles
from ray_cxr.models import classifier, runtime
from ray_cxr.storage.archives import read_members

ROOT = Path(__file__).parents[1]


class Touch:
    """An object that creates a file when its pickle is read."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self._ran}",)


def pickled(ran: Path) -> bytes:
    return pickle.dumps(Touch(ran))


def lambda_layer(ran: Path) -> bytes:
    """Write a `.keras` file whose Lambda layer, with code marshalled by Keras, creates a file when called."""
    import keras

    images = keras.Input((8,))
    out = keras.layers.Lambda(lambda t, _ran=str(ran): (open(_ran, "w").close(), t)[1], output_shape=(8,))(images)
    keras.Model(images, out).save(ran.with_name("m.keras"))
    ran.unlink(missing_ok=True)  # building the model called it
    return ran.with_name("m.keras").read_bytes()


def test_payload_works(tmp_path: Path) -> None:
    """Prove that the payload runs, so that the tests below can fail."""
    pickle.loads(pickled(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


@pytest.fixture
def copy(tiny_bundle, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, target)
    for file in [target, *target.iterdir()]:
        file.chmod(0o755)
    return target


def sign(bundle: Path) -> None:
    """Rewrite the checksums as an attacker can: they detect damage, not malice."""
    names = [line.split("  ")[1] for line in (bundle / bundles.SUMS).read_text(encoding="utf-8").splitlines()]
    lines = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (bundle / bundles.SUMS).write_text("".join(lines), encoding="utf-8")


# --- malicious bundles with valid checksums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "payload"),
    [(bundles.WEIGHTS, lambda_layer), *((name, pickled) for name in (bundles.WEIGHTS, "bundle.json", runtime.GOLDEN))],
)
def test_code_in_place_of_a_file_of_a_bundle_is_refused(
    name: str, payload: Callable[[Path], bytes], copy: Path, tmp_path: Path
) -> None:
    """Run Keras and the graph, which opens every file of the bundle."""
    (copy / name).write_bytes(payload(tmp_path / "ran"))
    sign(copy)

    def use() -> None:
        bundle = ray_cxr.load_bundle(copy)
        bundle.model()
        bundle.predict(np.zeros((1, 64, 64), np.uint8))

    with pytest.raises(BundleError):
        use()
    assert not (tmp_path / "ran").exists()


def test_object_arrays_and_zip_bombs_in_a_bundle_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy stores Python objects as pickles."""
    np.savez(tmp_path / "x.npz", images=np.array([Touch(tmp_path / "ran")], dtype=object))
    with pytest.raises(BundleError, match="damaged"), runtime.open_arrays(tmp_path / "x.npz") as arrays:
        arrays["images"]
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(runtime, "_MAX_UNPACKED", 1 << 20)
    np.savez_compressed(tmp_path / "y.npz", images=np.zeros(2 << 20, np.uint8))
    with pytest.raises(BundleError, match="unpacks to more than 1 MiB"), runtime.open_arrays(tmp_path / "y.npz"):
        pass


def test_bundle_cannot_name_a_class_a_module_or_a_finding(copy: Path) -> None:
    """The model is built from a few validated words; findings become column names and appear in reports."""
    info = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    script = ["<script>", *FINDINGS[1:]]
    for change, findings, reason in (
        ({"class_name": "Lambda"}, FINDINGS, r"bundle\.json: unknown"),
        ({"module": "os"}, FINDINGS, r"bundle\.json: unknown"),
        ({"backbone": "os.system"}, FINDINGS, r"bundle\.json: architecture\.backbone"),
        ({"findings": script}, script, "findings do not agree"),
    ):
        changed = {**info, "architecture": {**info["architecture"], **change}, "findings": findings}
        (copy / "bundle.json").write_text(json.dumps(changed), encoding="utf-8")
        sign(copy)
        with pytest.raises(BundleError, match=reason):
            ray_cxr.load_bundle(copy)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\..\\b", "bundle.json/../x"])
def test_checksums_of_a_bundle_cannot_leave_its_folder(name: str, copy: Path) -> None:
    with open(copy / bundles.SUMS, "a", encoding="utf-8") as stream:
        stream.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(BundleError, match="damaged"):
        ray_cxr.load_bundle(copy)


# --- third-party weights


def keras3(path: Path, fill: Callable[[h5py.Group], None]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file.create_group("layers/dense/vars"))
    return path


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"content of another file" * 10)
    keras3(tmp_path / "other.h5", lambda group: group.create_dataset("0", data=np.ones(3)))

    def stored_outside(group: h5py.Group) -> None:
        group.create_dataset("0", (10,), "u1", external=[(str(secret), 0, 10)])

    def linked(group: h5py.Group) -> None:
        group["0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "layers/dense/vars/0")

    def virtual(group: h5py.Group) -> None:
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "layers/dense/vars/0", (3,))
        group.create_virtual_dataset("0", layout)

    paths = [keras3(tmp_path / f"{fill.__name__}.weights.h5", fill) for fill in (stored_outside, linked, virtual)]
    with h5py.File(tmp_path / "old.h5", "w") as file:  # as written by Keras 2
        file.attrs["layer_names"] = [b"dense"]
        file.create_group("dense").attrs["weight_names"] = [b"w"]
        file["dense/w"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "layers/dense/vars/0")
    for path in (*paths, tmp_path / "old.h5"):
        with pytest.raises(ConfigError, match="another file"):
            classifier.stored_arrays(path)
    inside = keras3(tmp_path / "in.weights.h5", lambda group: group.create_dataset("0", data=7))
    assert [array.tolist() for array in classifier.stored_arrays(inside)["dense"]] == [7]


def test_weights_above_the_limit_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unwritten array of any shape occupies no space in the file."""

    def vast(group: h5py.Group) -> None:
        group.create_dataset("0", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip")

    path = keras3(tmp_path / "vast.weights.h5", vast)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ConfigError, match="2 GiB"):
        classifier.stored_arrays(path)
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("model.weights.h5", bytes(2 << 20))
    monkeypatch.setattr(classifier, "MAX_WEIGHTS_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match="GiB of weights"):
        classifier.stored_arrays(tmp_path / "m.keras")


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    for name in ("m.h5", "m.keras"):
        (tmp_path / name).write_bytes(pickled(tmp_path / "ran"))
    with h5py.File(tmp_path / "round.weights.h5", "w") as file:
        file.create_group("layers")["layers"] = h5py.SoftLink("/")
    for name in ("m.h5", "m.keras", "round.weights.h5"):
        with pytest.raises(ConfigError, match="not a Keras"):
            classifier.stored_arrays(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# --- tables and archives


def test_members_of_an_archive_are_read_and_never_written(tmp_path: Path) -> None:
    archive, names = tmp_path / "in" / "x.tar.gz", ["../up.png", "/abs.png", "a/../../b.png", "~/home.png"]
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    before = sorted(tmp_path.rglob("*"))
    assert dict(read_members(str(archive), set(names))) == dict.fromkeys(names, b"abc")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("cell", ["../../evil.png", "/etc/passwd", "a/../../evil.png"])
def test_an_image_name_of_a_table_is_looked_up_and_not_opened(cell: str, tmp_path: Path, command) -> None:
    (tmp_path / "evil.png").write_bytes(b"not among the images")
    (tmp_path / "t.csv").write_text(f"Image Index,Finding Labels,Patient ID\n{cell},No Finding,1\n")
    images, out = tmp_path / "images", tmp_path / "m.parquet"
    images.mkdir()
    Image.new("L", (64, 64)).save(images / "other.png")
    code, _, err = command("manifest", tmp_path / "t.csv", "--images", images, "--out", out)
    assert "Traceback" not in err
    assert code in (0, 2)
    if code == 0:
        assert pd.read_parquet(out)["path"].isna().all()


# --- patients


NAME, NUMBER, BORN = "Zweistein^Ilse", "PAT-4711-X", "19031104"
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "whole": bytes,
    "cut in the header": lambda data: data[: data.index(BORN.encode()) + 4],
    "cut in the pixels": lambda data: data[:-2000],
    "a wrong representation": lambda data: data.replace(b"PN", b"ZZ"),
    "an unknown transfer syntax": lambda data: data.replace(b"1.2.840.10008.1.2.1", b"1.2.840.10008.9.2.1"),
    "an invalid date": lambda data: data.replace(BORN.encode(), b"Zweistei"),
    "text instead of a number": lambda data: data.replace(b"US\x02\x00\x40\x00", b"LO\x02\x00\x40\x00"),
}
#: Decodes files with all output and logging of Python and its libraries.
DECODE = """
import logging, sys, warnings
logging.basicConfig(level=logging.DEBUG)
warnings.simplefilter("always")
from ray_cxr.config import InputSpec
from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.sandbox import Decoder
from ray_cxr.errors import ImageError
with Decoder([InputSpec(size=32)], tags=False) as decoder:
    for path in sys.argv[1:]:
        print(decoder.load(path))
        try:
            print(load_image(path).shape)
        except ImageError as error:
            print(repr(error))
"""


@pytest.mark.slow
def test_no_patient_data_in_messages_about_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "imaging")
    from test_dicom import dataset, written

    pixels = np.arange(64 * 64, dtype=np.uint32).astype(np.uint8).reshape(64, 64)
    person = {"PatientName": NAME, "PatientID": NUMBER, "PatientBirthDate": BORN}
    whole = written(dataset(pixels, **person, ReferringPhysicianName=NAME, AccessionNumber=NUMBER))
    assert all(secret.encode() in whole for secret in person.values())
    for name, damage in DAMAGES.items():
        (tmp_path / f"{name}.dcm").write_bytes(damage(whole))
        assert name == "whole" or damage(whole) != whole
    command = [sys.executable, "-c", DECODE, *map(str, tmp_path.glob("*.dcm"))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=ROOT, timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("ImageError(") >= 3
    for secret in (NAME, NAME.split("^")[0], NUMBER, BORN):
        assert secret not in output
