"""Synthetic images, labels and scores, and reports on them, for the tests of reports."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import Markup
from PIL import Image

from ray_cxr.data import manifest
from ray_cxr.evaluation.ranking import combine
from ray_cxr.imaging import overlays
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting import examples, figure_set, inline_svg, plots, worklist_page
from ray_cxr.reporting.report import write_report

FEW = ("Cardiomegaly", "Effusion", "Hernia")


class Archive:
    """Images of patients, labels, and a score folder whose model is better than chance.

    Every patient has three images. Patients 0-9 are train, 10-14 val, the rest test. The images of the last patient
    failed, with different codes. Hernia has no positive. Only a few image files exist.
    """

    def __init__(self, root: Path, patients: int = 60, findings: Sequence[str] = (*FEW, NO_FINDING)) -> None:
        rng = np.random.default_rng(0)
        self.root, self.findings = root, tuple(findings)
        self.diseases = [finding for finding in findings if finding != NO_FINDING]
        self.n = n = 3 * patients
        number = np.arange(n) // 3
        self.patient: list[str | None] = [str(patient) for patient in number]
        self.ids = [f"{i // 3:08d}_{i % 3:03d}.png" for i in range(n)]
        self.study: list[str | None] = [f"s{i // 3}" if i % 3 < 2 else None for i in range(n)]
        self.split = np.where(number < 10, "train", np.where(number < 15, "val", "test"))
        self.ok = number < patients - 1
        self.threshold = 0.3
        self.y = {f: (rng.random(n) < 0.3).astype(np.int8) for f in findings}
        if "Hernia" in self.y:
            self.y["Hernia"][:] = 0
        logits = {f: 2.0 * y - 2.0 + rng.normal(size=n) for f, y in self.y.items()}
        self.p = {f: (1 / (1 + np.exp(-values))).astype(np.float32) for f, values in logits.items()}
        self.spread: dict[str, np.ndarray] = {}  # of a model that averages
        (root / "images").mkdir(parents=True)
        self.paths = [str(root / "images" / name) for name in self.ids]
        for path in self.paths[::4]:
            Image.fromarray(rng.integers(0, 255, (48, 40), dtype=np.uint8)).save(path)

    @property
    def tested(self) -> np.ndarray:
        """Return which images the test split evaluates."""
        return (self.split == "test") & self.ok

    def labels(self, *, keep: Sequence[int] | None = None, info: dict[str, Any] | None = None, **changes: Any) -> str:
        """Write the manifest. Keywords replace columns; `keep` selects rows; `info` describes the split."""
        columns: dict[str, Any] = dict.fromkeys(manifest.SCHEMA.names, [None] * self.n)
        columns |= {"image_id": self.ids, "path": self.paths, "patient_id": self.patient, "split": list(self.split)}
        columns |= {**{f: y.tolist() for f, y in self.y.items()}, **changes}
        rows = pa.array(range(self.n) if keep is None else keep, pa.int64())
        table = pa.table(columns, manifest.SCHEMA).take(rows)
        info = {"kind": "patient", "seed": 0, "tables": {"table.csv": "ab" * 32}} if info is None else info
        metadata = {manifest.SPLIT_KEY: json.dumps(info)}
        pq.write_table(table.replace_schema_metadata(metadata), self.root / "labels.parquet")
        return str(self.root / "labels.parquet")

    def scores(self, *, ids: Sequence[str] | None = None, finished: bool = True, **model: Any) -> str:
        """Write the score folder. Keywords replace entries of model.json."""
        failed, codes = ~self.ok, ["missing", "corrupt", "missing"] * self.n
        columns: dict[str, Any] = {
            "image_id": pa.array(ids or self.ids),
            "path": pa.array(self.paths),
            "patient_id": pa.array(self.patient, pa.string()),
            "study_id": pa.array(self.study, pa.string()),
            "status": pa.array(np.where(failed, "error", "ok")),
            "error_code": pa.array([codes[i] if failed[i] else None for i in range(self.n)], pa.string()),
            "quality_flag": pa.array(["lateral" if i == 50 else None for i in range(self.n)]),
            "model_digest": pa.array(["d1" * 32] * self.n, mask=failed),
            "embedding": pa.array([[0.0, 1.0]] * self.n),  # reports ignore this column
        }
        for f in self.findings:
            columns[f"p_{f}"] = pa.array(self.p[f], pa.float32(), mask=failed)
            columns[f"c_{f}"] = pa.array(self.p[f] * 0.9, pa.float32(), mask=failed)
            columns[f"flag_{f}"] = pa.array(self.p[f] >= self.threshold, pa.bool_(), mask=failed)
            if f in self.spread:
                columns[f"p_spread_{f}"] = pa.array(self.spread[f], pa.float32(), mask=failed)
        c = np.column_stack([self.p[f] * np.float32(0.9) for f in self.diseases])
        columns["top_finding"] = pa.array(np.array(self.diseases)[c.argmax(axis=1)], pa.string(), mask=failed)
        for name in ("abnormality", "priority"):
            columns[name] = pa.array(combine(c).astype(np.float32), pa.float32(), mask=failed)
        folder = self.root / "SCORES"
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        for part, start in enumerate(range(0, self.n, 70)):
            pq.write_table(pa.table(columns).slice(start, 70), folder / "scores" / f"{part:05d}.parquet")
        used = pa.table({"image_id": self.ids, "patient_id": pa.array(self.patient, pa.string()), "split": self.split})
        pq.write_table(used.filter(pa.array(self.split != "test")), folder / "split.parquet")
        point = {"threshold": self.threshold, "rule": "youden", "n": 45, "positives": 9, "flag_rate": 0.4}
        described = {
            "format": 1,
            "digest": "d1" * 32,
            "backbone": "TinyCNN",
            "findings": list(self.findings),
            "input_spec": {"size": 64, "aspect": "stretch", "interpolation": "area"},
            "calibration": dict.fromkeys(self.findings),
            "operating_points": dict.fromkeys(self.findings, point),
            "expected_flag_rates": dict.fromkeys(self.findings, 0.4),
            "provenance": {"split": {"kind": "patient"}, "initial_weights": "random", "lineage": "known"},
            "curves": [{"epoch": e, "loss": 0.7 / e, "val_auroc": None if e == 1 else 1 - 0.4 / e} for e in (1, 2, 3)],
            **model,
        }
        (folder / "model.json").write_text(json.dumps(described), encoding="utf-8")
        weights = dict.fromkeys(self.diseases, 1.0)
        ranking = {"probabilities": "calibrated", "weights": weights, "left_out": []}
        run = {"rows": self.n, "input_digest": "aa", "ranking": ranking}
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        (folder / "_SUCCESS").unlink(missing_ok=True)
        if finished:
            (folder / "_SUCCESS").touch()
        return str(folder)


def write_csv(path: Path, rows: list[list[Any]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return str(path)


def add_heatmaps(scores: str, archive: Archive, rows: np.ndarray, hits: set[int]) -> None:
    """Write heat maps of 4 x 4 cells for Effusion, with the maximum at the upper left (hits) or lower right."""
    folder = Path(scores) / overlays.HEATMAPS
    folder.mkdir()
    lines = []
    for i in rows:
        cells = np.zeros((4, 4), np.float32)
        cells[(0, 0) if i in hits else (3, 3)] = 1.0
        line = dict.fromkeys(overlays.SCHEMA.names) | {"image_id": archive.ids[i], "finding": "Effusion", "rank": 1}
        line |= {"p": 0.5, "evidence": 1.0, "height": 4, "width": 4, "map": cells.ravel().tolist()}
        line |= {"top": 0.0, "left": 0.0, "bottom": 1.0, "right": 1.0, "picture_height": 48, "picture_width": 40}
        lines.append(line | {"overlay": f"{i}.png"})
    pq.write_table(pa.Table.from_pylist(lines, overlays.SCHEMA), folder / "part-00000.parquet")


def write_boxes(path: Path, rows: list[list[Any]]) -> str:
    """Write a table of boxes: image id, finding, left, top, width, height in pixels of 1024."""
    return write_csv(path, [["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"], *rows])


@dataclass(frozen=True)
class Report:
    """A written report: its folder, the content of metrics.json, the page, the archive and the options."""

    out: Path
    metrics: dict[str, Any]
    page: str
    archive: Archive
    options: dict[str, Any] = field(default_factory=dict)

    def worklist(self) -> list[dict[str, str]]:
        with open(self.out / "worklist.csv", encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))


@contextlib.contextmanager
def without_drawing(*, images: bool = False, cases: bool = False) -> Iterator[None]:
    """Skip figures and the plotting script, which take seconds, and also the worklist's images without `images`,
    and the examples without `cases`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "encode_figure", lambda figure: (b"png", b"svg"))
        patch.setattr(inline_svg, "embed_figure", lambda *_: Markup("<svg></svg>"))
        patch.setattr(figure_set, "draw_evaluation", lambda *_: {})
        if not cases:
            patch.setattr(examples, "select_cases", lambda *_: {})
        if not images:
            patch.setattr(worklist_page, "add_images", lambda studies, *_: studies)
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patch.setattr("plotly.offline.get_plotlyjs", lambda: "window.Plotly = {};")
        yield


def refused(error: type[Exception], match: str, scores: str | Path, out: Path, **options: Any) -> str:
    """Return the error, a single line, of a report that is refused and leaves no folder."""
    existed = out.exists()
    with pytest.raises(error, match=match) as caught:
        write_report(scores, out, **options)
    assert "\n" not in str(caught.value)
    assert out.exists() == existed
    return str(caught.value)


def report(
    archive: Archive,
    out: Path,
    *,
    scores: str | None = None,
    draw: bool = False,
    images: bool = False,
    cases: bool = False,
    **options: Any,
) -> Report:
    """Write a report; with figures if `draw` is set, and with the worklist's images if `images` is set."""
    options = {"n_resamples": 60, **options}
    with contextlib.nullcontext() if draw else without_drawing(images=images, cases=cases):
        returned = write_report(scores or archive.scores(), out, **options)
    written = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(returned, allow_nan=False))
    return Report(out, written, (out / "report.html").read_text(encoding="utf-8"), archive, options)
