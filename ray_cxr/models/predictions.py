"""Turn probabilities into rows of a score table: calibration, flags, priority. All callers use this module.

`evaluation.ranking` defines abnormality, priority and top_finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from ray_cxr.errors import RayCxrError
from ray_cxr.evaluation import calibration, quality
from ray_cxr.evaluation.ranking import RankedFindings, combine
from ray_cxr.imaging.views import parse_view
from ray_cxr.labels import SPREAD_PREFIX

IDENTITY = ("image_id", "path", "patient_id", "study_id")
#: Optional columns, from the manifest or a DICOM header.
ABOUT = (("age", pa.float64()), ("sex", pa.string()), ("view", pa.string()))
#: What identifies an image in the scores of another run: from a PACS or a DICOM header, and SHA-256 of the file, hex.
MARKS = ("sop_instance_uid", "content_digest")
#: Flags of views that are not frontal; a decubitus view is frontal, and whether it is unusual is seen in its pixels.
_FLAGS_OF_VIEWS = {"LATERAL": "lateral", "OBLIQUE": "not_frontal_chest"}


@dataclass(frozen=True)
class Rules:
    """The rules that turn a bundle's probabilities into score rows: all are the bundle's except the weights."""

    findings: tuple[str, ...]
    calibrations: Mapping[str, calibration.Calibration | None]
    thresholds: Mapping[str, float | None]  # for raw probabilities
    age_range: tuple[float, float] | None  # of the training patients, years; None if unknown
    digest: str
    weights: Mapping[str, float] = field(default_factory=dict)  # of findings in the priority; 1 if missing

    @property
    def ranked(self) -> RankedFindings:
        """The findings that abnormality, priority and top_finding use."""
        return RankedFindings.choose(self.findings, [name for name, fitted in self.calibrations.items() if fitted])


def schema(findings: Sequence[str], *, spread: bool = False) -> pa.Schema:
    """Return the Arrow schema of a score table for these findings.

    With `spread` it has `p_spread_<Finding>`, the standard deviation of the probabilities that were averaged.
    """
    return pa.schema(
        [
            *((name, pa.string()) for name in (*IDENTITY, "status", "error_code", "error")),
            *((f"p_{name}", pa.float32()) for name in findings),
            *((f"c_{name}", pa.float32()) for name in findings),
            *((f"{SPREAD_PREFIX}{name}", pa.float32()) for name in (findings if spread else ())),
            *((f"flag_{name}", pa.bool_()) for name in findings),
            ("top_finding", pa.string()),
            ("abnormality", pa.float32()),
            ("priority", pa.float32()),
            ("quality_flag", pa.string()),
            ("model_digest", pa.string()),
            *ABOUT,
            *((name, pa.string()) for name in MARKS),
        ]
    )


def calibrate(probabilities: np.ndarray, rules: Rules) -> np.ndarray:
    """Compute calibrated probabilities, float32 [N,F]; NaN for findings without calibration."""
    result = np.full(probabilities.shape, np.nan, dtype=np.float32)
    for j, name in enumerate(rules.findings):
        fitted = rules.calibrations.get(name)
        if fitted is not None:
            result[:, j] = calibration.apply_calibration(fitted, probabilities[:, j])
    return result


def order_findings(probabilities: np.ndarray, rules: Rules) -> np.ndarray:
    """Return the numbers of the findings from the highest to the lowest, int [N,D], without No_Finding.

    The first is the top_finding. Findings that the ranking leaves out are last, by raw probability. Ties keep the order
    of the findings.
    """
    ranked = rules.ranked
    values = calibrate(probabilities, rules) if ranked.is_calibrated else probabilities
    columns = [rules.findings.index(name) for name in (*ranked.names, *ranked.left_out)]
    keys = np.where(np.isin(rules.findings, ranked.left_out), probabilities - 1.0, values)[:, columns]
    return np.asarray(columns, dtype=np.intp)[np.argsort(-keys, axis=1, kind="stable")]


def assemble(
    rows: pa.Table,
    probabilities: np.ndarray,
    failures: Mapping[int, tuple[str, str]],
    rules: Rules,
    flags: Sequence[str | None] | None = None,
    header_flags: Mapping[int, Sequence[str]] = MappingProxyType({}),
    spread: np.ndarray | None = None,
) -> pa.Table:
    """Build one score row per manifest row, in the same order; every model column is null on an error row.

    Args:
        rows: image_id, path, patient_id, study_id; also age, sex, view and `MARKS` if they are known.
        probabilities: float32 [N,F]; rows in `failures` are ignored.
        failures: row number -> (error_code, message).
        flags: the quality flag of each row, from pixels and features, or None.
        header_flags: row number -> quality flags from its DICOM header.
        spread: float32 [N,F], see `schema`.

    Raises:
        RayCxrError: a probability of a row without failure is not in 0..1.
    """
    n, findings = len(rows), rules.findings
    p = np.asarray(probabilities, dtype=np.float32)
    if p.shape != (n, len(findings)):
        raise ValueError(f"probabilities are {p.shape}, expected {(n, len(findings))}")
    bad = np.zeros(n, dtype=bool)
    bad[list(failures)] = True
    broken = np.flatnonzero(~bad & ~((p >= 0) & (p <= 1)).all(axis=1))  # NaN too
    if broken.size:
        first = rows["image_id"][int(broken[0])].as_py()
        raise RayCxrError(
            f"{first}: the model returned a probability that is not between 0 and 1; its weights are damaged, or its "
            "training diverged"
        )

    # Columns that are missing here become null.
    optional = (*(name for name, _ in ABOUT), *MARKS)
    known = (*IDENTITY, *(name for name in optional if name in rows.column_names))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: rows[name] for name in known}
    columns["status"] = pa.array(np.where(bad, "error", "ok"), pa.string())
    for k, name in enumerate(("error_code", "error")):
        columns[name] = pa.array([failures[i][k] if i in failures else None for i in range(n)], pa.string())
    p = np.where(bad[:, None], np.float32(0.5), p)
    calibrated = calibrate(p, rules)
    for j, name in enumerate(findings):
        columns[f"p_{name}"] = pa.array(p[:, j], pa.float32(), mask=bad)
        if spread is not None:
            columns[f"{SPREAD_PREFIX}{name}"] = pa.array(spread[:, j], pa.float32(), mask=bad)
        threshold = rules.thresholds.get(name)
        if rules.calibrations.get(name) is not None:
            columns[f"c_{name}"] = pa.array(calibrated[:, j], pa.float32(), mask=bad)
        if threshold is not None:
            columns[f"flag_{name}"] = pa.array(calibration.apply_threshold(p[:, j], threshold), pa.bool_(), mask=bad)

    ranked = rules.ranked
    if ranked.names:
        chosen = [findings.index(name) for name in ranked.names]
        values = (calibrated if ranked.is_calibrated else p)[:, chosen]
        top = np.array(ranked.names, dtype=object)[values.argmax(axis=1)]
        columns["top_finding"] = pa.array(top, pa.string(), mask=bad)
        weights = list(ranked.list_weights(rules.weights).values())
        for name, result in (("abnormality", combine(values)), ("priority", combine(values, weights))):
            columns[name] = pa.array(result.astype(np.float32), pa.float32(), mask=bad)
    columns["quality_flag"] = pa.array(_quality_flags(rows, rules, flags, header_flags), pa.string(), mask=bad)
    columns["model_digest"] = pa.array([rules.digest] * n, pa.string(), mask=bad)
    wanted = schema(findings, spread=spread is not None)
    return pa.table([columns.get(item.name, pa.nulls(n, item.type)) for item in wanted], schema=wanted)


def _quality_flags(
    rows: pa.Table, rules: Rules, flags: Sequence[str | None] | None, header_flags: Mapping[int, Sequence[str]]
) -> list[str | None]:
    """Return the most severe flag of each row, from its age and view, its pixels (`flags`) and its header."""
    unknown = [None] * len(rows)
    ages, views = (rows[name].to_pylist() if name in rows.column_names else unknown for name in ("age", "view"))
    youngest, oldest = rules.age_range or (-np.inf, np.inf)
    result = []
    for row, (flag, age, view) in enumerate(zip(flags or unknown, ages, views, strict=True)):
        of_age = None if age is None or youngest <= age <= oldest else "age_outside_training"
        view = parse_view(view or "")  # a Parquet manifest of other software can spell it in another way
        of_view = _FLAGS_OF_VIEWS.get(view or "")
        # The tag is more reliable than an estimate from pixels.
        of_pixels = None if flag == "lateral" and view in ("PA", "AP") else flag
        result.append(quality.find_most_severe([of_pixels, of_age, of_view, *header_flags.get(row, ())]))
    return result
