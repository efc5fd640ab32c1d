"""From probabilities to the rows of a score table: calibration, flags, priority; one place for every caller.

For a finding with probability p and an operating point t, the rank is

    r = 0.5 * p / t                      below t
    r = 0.5 + 0.5 * (p - t) / (1 - t)    from t on

so that r >= 0.5 exactly where the finding is flagged, and findings as rare as Hernia compare with those as common
as Infiltration. A finding without an operating point cannot be flagged: it has r = 0.49 p, below all that are.
`priority` is the largest r over the findings,
`top_finding` the one that has it; No_Finding takes no part in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_cxr.errors import RayCxrError
from ray_cxr.evaluation import calibration, quality
from ray_cxr.labels import NO_FINDING

#: The highest rank of a finding that has no operating point.
UNFLAGGED = 0.49
IDENTITY = ("image_id", "path", "patient_id", "study_id")
#: What else is known of a row, from the manifest or a DICOM header.
ABOUT = (("age", pa.float64()), ("sex", pa.string()), ("view", pa.string()))


@dataclass(frozen=True)
class Rules:
    """What a bundle says about reading its probabilities.

    Attributes:
        findings: output order.
        calibrations: per finding how raw probabilities become calibrated ones, or None.
        thresholds: per finding the operating point on the raw probability, or None.
        age_range: youngest and oldest training patient, years; None where unknown.
        digest: the bundle's digest, hex.
    """

    findings: tuple[str, ...]
    calibrations: Mapping[str, calibration.Calibration | None]
    thresholds: Mapping[str, float | None]
    age_range: tuple[float, float] | None
    digest: str


def schema(findings: Sequence[str]) -> pa.Schema:
    """The Arrow schema of a score table for these findings."""
    return pa.schema(
        [
            *((name, pa.string()) for name in IDENTITY),
            ("status", pa.string()),
            ("error_code", pa.string()),
            ("error", pa.string()),
            *((f"p_{name}", pa.float32()) for name in findings),
            *((f"c_{name}", pa.float32()) for name in findings),
            *((f"flag_{name}", pa.bool_()) for name in findings),
            ("top_finding", pa.string()),
            ("priority", pa.float32()),
            ("quality_flag", pa.string()),
            ("model_digest", pa.string()),
            *ABOUT,
        ]
    )


def ranks(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The comparable rank of every probability (see the module's docstring).

    Args:
        probabilities: float [N,F].
        thresholds: float [F] inside (0, 1); NaN where a finding has none.

    Returns:
        float64 [N,F] in 0..1; NaN where the probability is.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    t = np.asarray(thresholds, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        r = np.where(p >= t, 0.5 + 0.5 * (p - t) / (1.0 - t), 0.5 * p / t)
    return np.where(np.isnan(t), UNFLAGGED * p, r)


def assemble(
    rows: pa.Table,
    probabilities: np.ndarray,
    failures: Mapping[int, tuple[str, str]],
    rules: Rules,
    judged: Sequence[str | None] | None = None,
) -> pa.Table:
    """One score row per manifest row.

    Args:
        rows: image_id, path, patient_id, study_id, and age, sex and view where they are known.
        probabilities: float32 [N,F]; rows named in `failures` are ignored.
        failures: row number -> (error_code, message).
        rules: the bundle's.
        judged: per row the quality flag by pixels and features, or None; None for all: they were not judged.

    Returns:
        A table of `schema(rules.findings)`, rows in the order given; every model column null on an error row.

    Raises:
        ValueError: probabilities of another shape.
        RayCxrError: a good row with a probability that is not a number in 0..1: the network is broken.
    """
    n, findings = len(rows), rules.findings
    p = np.asarray(probabilities, dtype=np.float32)
    if p.shape != (n, len(findings)):
        raise ValueError(f"probabilities are {p.shape}, expected {(n, len(findings))}")
    bad = np.zeros(n, dtype=bool)
    bad[list(failures)] = True
    good = p[~bad]
    sound = ((good >= 0) & (good <= 1)).all(axis=1)  # NaN fails it too
    if not sound.all():
        first = rows["image_id"][int(np.flatnonzero(~bad)[np.flatnonzero(~sound)[0]])].as_py()
        raise RayCxrError(
            f"{first}: the network gave a probability that is not a number between 0 and 1; its weights are damaged "
            "or diverged"
        )

    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: rows[name] for name in IDENTITY}
    for name, kind in ABOUT:
        columns[name] = rows[name] if name in rows.column_names else pa.nulls(n, kind)
    columns["status"] = pa.array(np.where(bad, "error", "ok"), pa.string())
    columns["error_code"] = pa.array([failures[i][0] if i in failures else None for i in range(n)], pa.string())
    columns["error"] = pa.array([failures[i][1] if i in failures else None for i in range(n)], pa.string())
    thresholds = np.full(len(findings), np.nan)
    for j, name in enumerate(findings):
        columns[f"p_{name}"] = pa.array(p[:, j], pa.float32(), mask=bad)
        fitted = rules.calibrations.get(name)
        columns[f"c_{name}"] = (
            pa.array(calibration.apply(fitted, np.where(bad, 0.5, p[:, j])), pa.float32(), mask=bad)
            if fitted
            else pa.nulls(n, pa.float32())
        )
        threshold = rules.thresholds.get(name)
        if threshold is None:
            columns[f"flag_{name}"] = pa.nulls(n, pa.bool_())
        else:
            thresholds[j] = threshold
            columns[f"flag_{name}"] = pa.array(calibration.flags(p[:, j], threshold), pa.bool_(), mask=bad)

    disease = [j for j, name in enumerate(findings) if name != NO_FINDING]
    if disease and n:
        r = ranks(np.where(bad[:, None], 0.0, p), thresholds)[:, disease]
        best = r.argmax(axis=1)
        names = np.array([findings[j] for j in disease], dtype=object)[best]
        columns["top_finding"] = pa.array(names, pa.string(), mask=bad)
        columns["priority"] = pa.array(r[np.arange(n), best].astype(np.float32), pa.float32(), mask=bad)
    else:
        columns["top_finding"], columns["priority"] = pa.nulls(n, pa.string()), pa.nulls(n, pa.float32())
    columns["quality_flag"] = pa.array(
        [None if bad[i] else flag for i, flag in enumerate(_quality(rows, rules, judged))], pa.string()
    )
    columns["model_digest"] = pa.array([rules.digest] * n, pa.string(), mask=bad)
    wanted = schema(findings)
    return pa.table([columns[item.name] for item in wanted], schema=wanted)


def _quality(rows: pa.Table, rules: Rules, judged: Sequence[str | None] | None) -> list[str | None]:
    """The gravest flag of each row, by what its tags say and what its pixels say."""
    found: list[list[str | None]] = [[flag] for flag in judged or [None] * len(rows)]
    if "age" in rows.column_names and rules.age_range is not None:
        low, high = rules.age_range
        for i, age in enumerate(rows["age"].to_pylist()):
            if age is not None and not low <= age <= high:
                found[i].append("age_outside_training")
    if "view" in rows.column_names:
        for i, view in enumerate(rows["view"].to_pylist()):
            if view == "LATERAL":
                found[i].append("lateral")
            elif view in ("PA", "AP") and found[i][0] == "lateral":
                found[i][0] = None  # the tag says that it is frontal, and the pixels only guess
    return [quality.gravest(flags) for flags in found]
