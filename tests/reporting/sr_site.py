"""A folder of DICOM files and the folder of their scores, for the tests of exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from ray_cxr.evaluation.calibration import Calibration
from ray_cxr.imaging import overlays
from ray_cxr.labels import FINDINGS
from ray_cxr.models import predictions

Command = Callable[..., tuple[int, str, str]]

NAME, PATIENT_ID, BIRTH, ACCESSION = "Zweistein", "PAT-4711", "19340506", "ACC-0815"
IDENTIFYING = (NAME, PATIENT_ID, BIRTH, ACCESSION)  # must not appear anywhere but in the documents
ROOT = "1.2.826.0.1.3680043.9999"


def write_image(path: Path, number: int, study: int, **changes: Any) -> Path:
    """Write a CR image that ends where its pixels would start; None removes an element."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}.1.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.2.{study}", f"{ROOT}.3.{number}"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = NAME, PATIENT_ID, BIRTH, "F"
    ds.PatientAge, ds.AccessionNumber, ds.StudyID = "077Y", ACCESSION, "S1"
    ds.StudyDate, ds.StudyTime, ds.StudyDescription = "20260102", "131415", "Chest"
    ds.ReferringPhysicianName, ds.Modality, ds.Rows, ds.Columns = "Doctor^Jane", "CR", 64, 64
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
        if value is None:
            delattr(ds, keyword)
    ds.save_as(path, enforce_file_format=True)
    # Only the tag and length of the pixels: a reader that wants them finds the file cut short.
    with open(path, "ab") as file:
        file.write(b"\xe0\x7f\x10\x00OW\0\0\x00\x20\x00\x00")
    return path


def make_model(findings: tuple[str, ...], digest: str = "d1" * 32) -> tuple[predictions.Rules, dict[str, Any]]:
    """Return rules and model.json of a bundle with half of the findings calibrated, two thirds with a threshold."""
    thresholds = {name: 0.5 if i % 3 else None for i, name in enumerate(findings)}
    platt = Calibration.from_dict({"method": "platt", "slope": 2.0, "intercept": -1.0})
    calibrations = {name: platt if i % 2 else None for i, name in enumerate(findings)}
    points = {name: None if threshold is None else {"threshold": threshold} for name, threshold in thresholds.items()}
    model = {"digest": digest, "findings": findings, "operating_points": points}
    rules = predictions.Rules(findings, calibrations, thresholds, (10.0, 90.0), digest)
    return rules, {**model, "architecture": {"backbone": "TinyCNN"}}


@dataclass
class Site:
    """A folder with DICOM files, and the folder of their scores."""

    home: Path
    model: tuple[predictions.Rules, dict[str, Any]] = field(default_factory=lambda: make_model(FINDINGS[:2]))
    paths: list[str] = field(default_factory=list)
    studies: list[str | None] = field(default_factory=list)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores, self.out = self.home / "scores", self.home / "reports"

    def add(self, number: int, study: int, **changes: Any) -> Path:
        path = write_image(self.home / f"image{number}.dcm", number, study, **changes)
        self.add_path(path, f"{ROOT}.2.{study}")
        return path

    def add_path(self, path: Path | str, study: str | None) -> None:
        self.paths.append(str(path))
        self.studies.append(study)

    def write(self) -> None:
        """Write the score folder; the first image is of a child."""
        (rules, model), n = self.model, len(self.paths)
        columns = {"image_id": [f"image {i}" for i in range(n)], "path": self.paths, "age": [5.0] + [50.0] * (n - 1)}
        people = {"patient_id": pa.nulls(n, pa.string()), "study_id": pa.array(self.studies, pa.string())}
        rows = pa.table({**columns, **people})
        p = np.random.default_rng(3).random((n, len(rules.findings))).astype(np.float32)
        self.table = predictions.assemble(rows, p, self.failures, rules)
        (self.scores / "scores").mkdir(parents=True, exist_ok=True)
        half = n // 2 + 1
        for i, part in enumerate((self.table.slice(0, half), self.table.slice(half))):
            pq.write_table(part, self.scores / "scores" / f"part-{i:05d}.parquet")
        run: dict[str, Any] = {"versions": {"ray-cxr": "9.8.7"}, "finished": "2026-03-04T05:06:07+00:00"}
        run["heatmaps"] = {"method": "gradcam"}
        for name, content in (("settings", {"kind": "score"}), ("run", run), ("model", model)):
            (self.scores / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        (self.scores / "_SUCCESS").touch()

    def export(self, command: Command, *, code: int = 0) -> tuple[str, str]:
        """Write the score folder, run the command, and return its stdout and stderr."""
        self.write()
        return self.run(command, code=code)

    def run(self, command: Command, *more: object, code: int = 0, out: Path | None = None) -> tuple[str, str]:
        found, stdout, stderr = command("export-sr", self.scores, "--out", out or self.out, *more)
        assert found == code, stdout + stderr
        return stdout, stderr

    def images(self) -> list[dict[str, Any]]:
        """Return the export's record of each row of the scores."""
        return pq.read_table(self.out / "images.parquet").to_pylist()

    def documents(self) -> dict[str, Dataset]:
        """Return the documents by study."""
        found = {ds.StudyInstanceUID: ds for ds in map(pydicom.dcmread, self.out.glob("*.dcm"))}
        assert len(found) == len(list(self.out.glob("*.dcm")))
        return {uid.removeprefix(f"{ROOT}.2."): ds for uid, ds in found.items()}

    def draw_maps(self, *, without: tuple[int, ...] = (), size: tuple[int, int] = (128, 96)) -> None:
        """Write the heat maps of every scored row except `without`, as `score --heatmaps` does with Grad-CAM."""
        rows, folder = [], self.scores / overlays.HEATMAPS
        folder.mkdir(exist_ok=True)
        gray = np.tile(np.linspace(40, 200, size[1], dtype=np.uint8), (size[0], 1))
        for number, row in enumerate(self.table.to_pylist()):
            if row["status"] != "ok" or number in without:
                continue
            for rank, finding in enumerate(self.model[0].findings, start=1):
                cells = np.zeros((7, 7), np.float32)
                cells[2:4, 1:3] = rank
                name = overlays.overlay_name(row["image_id"], finding)
                drawn = overlays.draw_overlay(gray, cells, side=max(size))
                (folder / name).write_bytes(overlays.encode_jpeg(drawn))
                place = {"height": 7, "width": 7, "map": cells.ravel(), **overlays.WHOLE._asdict()}
                place |= {"picture_height": size[0], "picture_width": size[1], "overlay": name}
                head = {"image_id": row["image_id"], "finding": finding, "rank": rank, "p": row[f"p_{finding}"]}
                rows.append({**head, "evidence": cells.sum(), **place, "error_code": None, "error": None})
        pq.write_table(pa.Table.from_pylist(rows, overlays.SCHEMA), folder / "part-00000.parquet")

    def captures(self) -> list[Dataset]:
        """Return the captures, by finding and then by row."""
        found = pq.read_table(self.out / "heatmaps.parquet").to_pylist()
        return [pydicom.dcmread(self.out / "heatmaps" / f"{row['capture']}.dcm") for row in found if row["capture"]]
