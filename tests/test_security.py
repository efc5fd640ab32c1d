"""What others made and hand on: files made to run code, to read other files, to fill the memory, to leave their folder.

Each room's own tests hold more of it: archives (links, `..`, bombs) in tests/data/test_archives.py, pictures in
test_imaging.py, test_dicom.py and test_sandbox.py, damaged bundles in tests/models/test_bundle.py, what our code may
call in test_architecture.py. docs/security.md says what is trusted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

import ray_cxr
from ray_cxr.data import archives
from ray_cxr.errors import BundleError, ConfigError, ImageError
from ray_cxr.labels import FINDINGS
from ray_cxr.models import bundle as bundles
from ray_cxr.models import classifier, runtime

ROOT = Path(__file__).parents[1]


class Touch:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self._ran}",)


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the tests below would pass whatever is loaded."""
    pickle.loads(pickle.dumps(Touch(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.fixture
def copy(tiny_bundle, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, target)
    for file in [target, *target.iterdir()]:
        file.chmod(0o755)
    return target


def sign(bundle: Path, *more: str) -> None:
    """Write the sums again, as whoever made the bundle can: the digest guards against damage, not against its maker."""
    names = [line.split("  ")[1] for line in (bundle / bundles.SUMS).read_text().splitlines()]
    lines = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in [*names, *more]]
    (bundle / bundles.SUMS).write_text("".join(lines))


def use(path: Path) -> None:
    """Load a bundle and run it both ways, which opens every file that is ever read of it."""
    bundle = ray_cxr.load_bundle(path)
    bundle.model()
    assert bundle.quality is None or bundle.quality
    bundle.predict(np.zeros((1, 64, 64), np.uint8))


# --- a bundle whose maker means harm; its sums are right


@pytest.mark.slow
@pytest.mark.parametrize("name", [bundles.WEIGHTS, "bundle.json", runtime.GOLDEN])
def test_a_pickle_in_the_place_of_a_bundles_file_is_refused(name: str, copy: Path, tmp_path: Path) -> None:
    if not (copy / name).exists():
        pytest.skip(f"the bundle holds no {name}")
    (copy / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    sign(copy)
    with pytest.raises(BundleError):
        use(copy)
    assert not (tmp_path / "ran").exists()


def test_object_arrays_in_a_bundle_are_refused(tmp_path: Path) -> None:
    """NumPy keeps Python objects as a pickle inside its own format."""
    np.savez(tmp_path / "x.npz", images=np.array([Touch(tmp_path / "ran")], dtype=object))
    with pytest.raises(BundleError, match="damaged"), runtime.arrays_of(tmp_path / "x.npz") as arrays:
        arrays["images"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["extra.pkl", "model.keras", "saved_model.pb", "plugin.py"])
def test_a_bundle_that_lists_a_file_of_another_kind_is_refused(name: str, copy: Path) -> None:
    (copy / name).write_bytes(b"x")
    sign(copy, name)
    with pytest.raises(BundleError, match=re.escape(name)):
        ray_cxr.load_bundle(copy)


def lambda_model(ran: Path, target: Path) -> None:
    """A `.keras` file whose Lambda layer's code, marshalled by Keras itself, writes a file when it is called."""
    import keras

    images = keras.Input((8,))
    out = keras.layers.Lambda(lambda t, _ran=str(ran): (open(_ran, "w").close(), t)[1], output_shape=(8,))(images)
    keras.Model(images, out).save(target)
    ran.unlink(missing_ok=True)  # building the model called it


@pytest.mark.slow
def test_a_lambda_layer_in_the_place_of_the_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    lambda_model(tmp_path / "ran", tmp_path / "m.keras")
    shutil.copy(tmp_path / "m.keras", copy / bundles.WEIGHTS)
    sign(copy)
    with pytest.raises(BundleError):
        use(copy)
    assert not (tmp_path / "ran").exists()


def test_a_bundle_cannot_name_a_class_or_a_module(copy: Path) -> None:
    """The network is built by our code, out of a few checked words; there is no place for a class of somebody's."""
    info = json.loads((copy / "bundle.json").read_text())
    for change in ({"class_name": "Lambda"}, {"module": "os"}, {"backbone": "../../evil"}, {"backbone": "os.system"}):
        changed = {**info, "architecture": {**info["architecture"], **change}}
        (copy / "bundle.json").write_text(json.dumps(changed))
        sign(copy)
        with pytest.raises(BundleError, match=r"bundle\.json: (unknown|backbone)"):
            ray_cxr.load_bundle(copy)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\..\\b", "bundle.json/../x"])
def test_the_sums_of_a_bundle_cannot_leave_its_folder(name: str, copy: Path) -> None:
    with open(copy / bundles.SUMS, "a") as stream:
        stream.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(BundleError, match="damaged"):
        ray_cxr.load_bundle(copy)


def test_a_zip_bomb_among_a_bundles_arrays_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as packed, packed.open("a.npy", "w") as out:
        for _ in range(300):
            out.write(bytes(1 << 20))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    with pytest.raises(BundleError, match="unpacks to more than 256 MiB"), runtime.arrays_of(tmp_path / "x.npz"):
        pass


# --- somebody's weights


def keras3(path: Path, fill: Callable[[h5py.Group], None]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file.create_group("layers/dense/vars"))
    return path


def test_weights_lie_in_the_file_itself(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"what stands in another file" * 10)
    keras3(tmp_path / "other.h5", lambda group: group.create_dataset("0", data=np.ones(3)))

    def stored_outside(group: h5py.Group) -> None:
        group.create_dataset("0", (10,), "u1", external=[(str(secret), 0, 10)])

    def linked(group: h5py.Group) -> None:
        group["0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "layers/dense/vars/0")

    def virtual(group: h5py.Group) -> None:
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "layers/dense/vars/0", (3,))
        group.create_virtual_dataset("0", layout)

    for number, fill in enumerate((stored_outside, linked, virtual)):
        with pytest.raises(ConfigError, match="lies in another file"):
            classifier.stored_arrays(keras3(tmp_path / f"{number}.weights.h5", fill))
    found = classifier.stored_arrays(
        keras3(tmp_path / "in.weights.h5", lambda group: group.create_dataset("0", data=7))
    )
    assert [array.tolist() for array in found["dense"]] == [7]


def test_weights_of_an_older_keras_lie_in_the_file_itself(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["w"] = np.ones(3)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        file.create_group("dense").attrs["weight_names"] = [b"w"]
        file["dense/w"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "w")
    with pytest.raises(ConfigError, match="lies in another file"):
        classifier.stored_arrays(tmp_path / "old.h5")


def test_weights_that_declare_any_size_are_refused_unread(tmp_path: Path) -> None:
    """An array that nobody filled takes no room in the file, whatever its shape."""

    def vast(group: h5py.Group) -> None:
        group.create_dataset("0", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip")

    path = keras3(tmp_path / "vast.weights.h5", vast)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ConfigError, match="2 GiB"):
        classifier.stored_arrays(path)


def test_a_zip_bomb_of_weights_is_refused_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "MAX_WEIGHTS_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("model.weights.h5", bytes(2 << 20))
    with pytest.raises(ConfigError, match="GiB of weights"):
        classifier.stored_arrays(tmp_path / "m.keras")


def test_weights_that_go_round_in_circles_end(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "round.weights.h5", "w") as file:
        file.create_group("layers")["layers"] = h5py.SoftLink("/")
    with pytest.raises(ConfigError, match="not a Keras file"):
        classifier.stored_arrays(tmp_path / "round.weights.h5")


@pytest.mark.parametrize("name", ["m.h5", "m.keras"])
def test_a_pickle_is_no_file_of_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ConfigError):
        classifier.stored_arrays(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# --- tables and archives


def test_members_of_an_archive_are_read_and_never_written(tmp_path: Path) -> None:
    """Whatever a member is called, reading it leaves the disk as it is."""
    (tmp_path / "in").mkdir()
    names = ["../up.png", "/abs.png", "a/../../b.png", "~/home.png"]
    with tarfile.open(tmp_path / "in" / "x.tar.gz", "w:gz") as tar:
        for name in names:
            item = tarfile.TarInfo(name)
            item.size = 3
            tar.addfile(item, io.BytesIO(b"abc"))
    before = sorted(tmp_path.rglob("*"))
    found = dict(archives.read(str(tmp_path / "in" / "x.tar.gz"), set(names)))
    assert found == dict.fromkeys(names, b"abc")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"outside")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        item = tarfile.TarInfo("in.png")
        item.type, item.linkname = tarfile.SYMTYPE, "secret.png"
        tar.addfile(item)
    with pytest.raises(ImageError, match="not followed"):
        archives.read_one(str(tmp_path / "x.tar"), "in.png")


@pytest.mark.parametrize("cell", ["../../evil.png", "/etc/passwd", "a/../../evil.png"])
def test_an_image_name_of_a_table_is_looked_up_and_not_opened(cell: str, tmp_path: Path, command) -> None:
    """A path comes from the listing of --images alone; a name in a table only chooses among those."""
    (tmp_path / "images").mkdir()
    (tmp_path / "evil.png").write_bytes(b"not among the images")
    (tmp_path / "t.csv").write_text(f"Image Index,Finding Labels,Patient ID\n{cell},No Finding,1\n")
    import pandas as pd
    from PIL import Image

    Image.new("L", (64, 64)).save(tmp_path / "images" / "other.png")
    code, _, err = command(
        "manifest", tmp_path / "t.csv", "--images", tmp_path / "images", "--out", tmp_path / "m.parquet"
    )
    assert "Traceback" not in err
    if code == 0:
        assert pd.read_parquet(tmp_path / "m.parquet")["path"].isna().all()
    else:
        assert code == 2


# --- people


NAME, NUMBER, BORN = "Zweistein^Ilse", "PAT-4711-X", "19031104"


def radiograph(path: Path, damage: Callable[[bytes], bytes] = bytes) -> Path:
    """A small digital radiograph of somebody, then damaged."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PatientName, ds.PatientID, ds.PatientBirthDate = "DX", NAME, NUMBER, BORN
    ds.ReferringPhysicianName, ds.AccessionNumber = NAME, NUMBER
    ds.StudyInstanceUID = generate_uid()
    ds.Rows = ds.Columns = 64
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = np.arange(64 * 64, dtype=np.uint32).astype(np.uint8).tobytes()
    ds.save_as(path, enforce_file_format=True)
    path.write_bytes(damage(path.read_bytes()))
    return path


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "whole": bytes,
    "cut in the header": lambda data: data[:420],
    "cut in the pixels": lambda data: data[:-2000],
    "a wrong representation": lambda data: data.replace(b"PN", b"ZZ"),
    "a wrong length": lambda data: data.replace(b"DA\x08\x00", b"DA\xff\xff"),
    "an unknown transfer syntax": lambda data: data.replace(b"1.2.840.10008.1.2.1", b"1.2.840.10008.9.2.1"),
    "a date that is none": lambda data: data.replace(BORN.encode(), b"Zweistei"),
    "text instead of a number": lambda data: data.replace(b"US\x02\x00\x40\x00", b"LO\x02\x00\x40\x00"),
}


@pytest.mark.slow
def test_no_patient_is_in_what_is_said_of_an_image(tmp_path: Path) -> None:
    """In another process, with all that it and its libraries print and log: nothing of the header but codes."""
    paths = [str(radiograph(tmp_path / f"{number}.dcm", damage)) for number, damage in enumerate(DAMAGES.values())]
    assert NAME in str(pydicom.dcmread(paths[0]).PatientName)
    code = (
        "import logging, sys, warnings\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "warnings.simplefilter('always')\n"
        "from ray_cxr.config import InputSpec\n"
        "from ray_cxr.data.imaging import load\n"
        "from ray_cxr.data.sandbox import Decoder\n"
        "from ray_cxr.errors import ImageError\n"
        "with Decoder([InputSpec(size=32)], tags=False) as decoder:\n"
        "    for path in sys.argv[1:]:\n"
        "        print(decoder.load(path))\n"
        "        try:\n"
        "            print(load(path).shape)\n"
        "        except ImageError as error:\n"
        "            print(repr(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("ImageError(") >= 3
    for secret in (NAME, NAME.split("^")[0], NUMBER, BORN):
        assert secret not in said


def test_findings_of_a_bundle_are_ours(copy: Path) -> None:
    """They become names of columns and stand in pages: only words of our own list."""
    info = json.loads((copy / "bundle.json").read_text())
    names = ["<script>", *FINDINGS[1:]]
    (copy / "bundle.json").write_text(
        json.dumps({**info, "findings": names, "architecture": {**info["architecture"], "findings": names}})
    )
    sign(copy)
    with pytest.raises(BundleError):
        ray_cxr.load_bundle(copy)
