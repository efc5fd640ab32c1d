"""Evaluate scores against labels: every metric of `evaluation.metrics.METRICS`, per finding and averaged.

Each number has an interval from resampled patients, or the reason why it has none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_cxr.data.consensus import composite_flags, composite_scores
from ray_cxr.evaluation import metrics, usability
from ray_cxr.evaluation.bootstrap import DerivedOutputs, RocBand, bootstrap_findings
from ray_cxr.evaluation.clustered import (
    AUROC_METHOD,
    MEAN_METHOD,
    SHARE_METHOD,
    auroc_influence,
    auroc_interval,
    clustered_share_interval,
    logit_interval,
    mean_interval,
)
from ray_cxr.evaluation.delong import delong
from ray_cxr.evaluation.intervals import Interval, Patients
from ray_cxr.evaluation.subgroups import FEW_PATIENTS
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.scores import Scores, finite_or_none

_log = logging.getLogger(__name__)

#: Why a mean AUROC has no interval.
_ONE_PATIENT = "fewer than two patients"


@dataclass(frozen=True)
class BootstrapSettings:
    """Settings of the patient bootstrap, which all sections of a report share."""

    n_resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "method": "percentile bootstrap over patients",
            "level": 0.95,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "delong": "logit scale, images taken as independent",
            "auroc": AUROC_METHOD,
            "mean_auroc": MEAN_METHOD,
            "shares": SHARE_METHOD,
        }


@dataclass(frozen=True)
class ModelOutputs:
    """A model's predictions by finding, arrays [n] of one entry per image.

    `p` (raw) and `c` (calibrated) are float64 with NaN for null, `flags` int8 with -1 for null.
    """

    p: dict[str, np.ndarray]
    c: dict[str, np.ndarray]
    flags: dict[str, np.ndarray]
    operating_points: Mapping[str, Any]
    expected_flag_rates: Mapping[str, Any]

    @classmethod
    def select(cls, table: Scores, rows: np.ndarray) -> ModelOutputs:
        p, c, flags = ({f: values[rows] for f, values in part.items()} for part in (table.p, table.c, table.flags))
        return cls(p, c, flags, table.operating_points, table.model.get("expected_flag_rates") or {})

    def add_composites(self, composites: Mapping[str, tuple[str, ...]]) -> tuple[ModelOutputs, dict[str, str]]:
        """Add composite findings. A composite has its members' highest score and is flagged if any member is.

        Members' raw scores share no scale, so calibrated scores are used if every member has them. A composite of which
        the model lacks a member is skipped.

        Returns:
            The outputs, and `calibrated` or `raw` for each composite added.
        """
        p, flags, scales = dict(self.p), dict(self.flags), {}
        for name, members in composites.items():
            if all(member in self.p for member in members):
                calibrated = all(
                    member in self.c and np.array_equal(np.isnan(self.c[member]), np.isnan(self.p[member]))
                    for member in members
                )
                scales[name] = "calibrated" if calibrated else "raw"
                p[name] = composite_scores(members, self.c if calibrated else self.p)
            if all(member in self.flags for member in members):
                flags[name] = composite_flags(members, self.flags)
        return replace(self, p=p, flags=flags), scales


@dataclass(frozen=True)
class Measurement:
    """A metric's value and 95% intervals; `reason` explains a missing value, `interval_reason` missing percentiles.

    `low` and `high` are bootstrap percentiles. `wilson` holds also with few patients; pages show it where it exists.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    interval_reason: str | None = None
    wilson: tuple[float, float] | None = None

    @property
    def shown(self) -> Measurement:
        """Return the measurement with the interval that pages show as `low` and `high`."""
        return self if self.wilson is None else replace(self, low=self.wilson[0], high=self.wilson[1])

    def explain_no_percentiles(self, key: str) -> str:
        if self.wilson is None:
            return f"no interval: {self.interval_reason}"
        return f"no bootstrap percentiles: {self.interval_reason}; see {key}_interval_low and {key}_interval_high"


@dataclass(frozen=True)
class FindingResult:
    """Everything measured of one finding.

    Attributes:
        n: labelled and scored images.
        unscored: labelled images without a score.
        reason: why AUROC is undefined, or None.
        caution: why AUROC's interval should be read with caution, or None.
        fewest_patients: number of patients with it, or without it if they are fewer; images without an id count too.
    """

    n: int
    positives: int
    unscored: int
    metrics: dict[str, Measurement]
    positive_patients: int | None = 0  # None if no image has a patient id
    fewest_patients: int = 0
    prevalence: float | None = None
    reason: str | None = None
    caution: str | None = None
    delong: tuple[float, float] | None = None
    undefined_resamples: int | None = None
    threshold: float | None = None
    rule: str | None = None
    expected_flag_rate: float | None = None
    assumed_prevalence: float | None = None
    mean_calibrated: float | None = None
    roc_band: RocBand | None = None

    @property
    def auroc(self) -> Measurement:
        return self.metrics["auroc"]

    def to_json(self) -> dict[str, Any]:
        counts = ("n", "positives", "positive_patients", "prevalence", "unscored")
        model = ("threshold", "rule", "expected_flag_rate", "assumed_prevalence", "mean_calibrated")
        low, high = self.delong or (None, None)
        undefined = {key: found.reason for key, found in self.metrics.items() if found.value is None}
        unbounded = {key: found for key, found in self.metrics.items() if found.value is not None and found.low is None}
        undefined |= {f"{key}_low": found.explain_no_percentiles(key) for key, found in unbounded.items()}
        return {
            **{name: getattr(self, name) for name in counts},
            **_flatten(self.metrics),
            **_list_shown(self.metrics),
            "auroc_undefined_resamples": self.undefined_resamples,
            "auroc_delong_low": low,
            "auroc_delong_high": high,
            **{name: getattr(self, name) for name in (*model, "reason", "caution")},
            "undefined": undefined,
        }


@dataclass(frozen=True)
class MeanResult:
    """The mean of each ranking metric over the findings with a defined AUROC, without No_Finding.

    Attributes:
        reason: why there is no mean, or None.
        undefined_resamples: number of resamples in which a finding's AUROC is undefined.
        headline_reason: why the mean AUROC is not shown as a main result, or None.
        weights: what the findings are weighted by; None for equal weights.
    """

    metrics: dict[str, Measurement]
    findings: list[str]
    reason: str | None
    undefined_resamples: int
    headline_reason: str | None
    weights: str | None = None

    @property
    def auroc(self) -> Measurement:
        return self.metrics["auroc"]

    def to_json(self) -> dict[str, Any]:
        return ({"weights": self.weights} if self.weights else {}) | {
            **_flatten(self.metrics),
            **_list_shown(self.metrics, MEAN_METHOD),
            "auroc_interval_reason": None if self.auroc.value is None or self.auroc.wilson else _ONE_PATIENT,
            "undefined_resamples": self.undefined_resamples,
            "findings": self.findings,
            "reason": self.reason,
            "headline_reason": self.headline_reason,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """Results per finding, and their means with equal weights and weighted by positives."""

    findings: dict[str, FindingResult]
    macro: MeanResult
    weighted: MeanResult

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": {name: found.to_json() for name, found in self.findings.items()},
            "macro": self.macro.to_json(),
            "weighted": self.weighted.to_json(),
        }


def _flatten(measured: Mapping[str, Measurement]) -> dict[str, float | None]:
    return {
        f"{key}{suffix}": value
        for key, found in measured.items()
        for suffix, value in (("", found.value), ("_low", found.low), ("_high", found.high))
    }


def _list_shown(measured: Mapping[str, Measurement], auroc_method: str = AUROC_METHOD) -> dict[str, float | str | None]:
    """Return the interval that pages show, with its method, of each metric that can have one besides percentiles."""
    keys = ["auroc", *(metric.key for metric in metrics.RATE_METRICS if metric.share and metric.key in measured)]
    result: dict[str, float | str | None] = {}
    for key in keys:
        low, high = measured[key].wilson or (None, None)
        method = None if low is None else auroc_method if key == "auroc" else SHARE_METHOD
        result |= {f"{key}_interval_low": low, f"{key}_interval_high": high, f"{key}_interval_method": method}
    return result


def evaluate(
    outputs: ModelOutputs,
    labels: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    prevalences: Mapping[str, float],
    bootstrap: BootstrapSettings,
) -> EvaluationResult:
    """Compute all metrics of these images; all findings share the resamples.

    Args:
        labels: per finding int8 [n], -1 if not labelled, in the order of the report.
        patients: ids [n].
        prevalences: per finding, the prevalence to compute predictive values for, 0..1.
    """
    n = len(patients)
    diseases = [finding for finding in labels if finding != NO_FINDING]  # a model need not score this output
    names = [f for f in labels if f in outputs.p or (f in diseases and (labels[f] >= 0).any())]
    scored = [finding for finding in names if finding in outputs.p]
    _log.debug("bootstrap: %d resamples of %d images", bootstrap.n_resamples, n)
    derived = DerivedOutputs(
        flags=_stack([outputs.flags.get(f, np.full(n, -1)) for f in scored], n),
        calibrated=_stack([outputs.c.get(f, np.full(n, np.nan)) for f in scored], n),
        assumed_prevalence=np.array([prevalences.get(f, np.nan) for f in scored], dtype=np.float64),
    )
    found = bootstrap_findings(
        _stack([labels[f] for f in scored], n),
        _stack([outputs.p[f] for f in scored], n),
        patients,
        derived,
        macro=np.array([finding != NO_FINDING for finding in scored], dtype=bool),
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    intervals = dict(zip(scored, zip(found.findings, found.roc, strict=True), strict=True))
    known = Patients.of(patients)
    results = {
        f: _evaluate_finding(outputs, f, labels[f], known, prevalences.get(f), *intervals[f])
        if f in intervals
        else _report_unscored(labels[f])
        for f in names
    }
    averaged = {f: result for f, result in results.items() if result.auroc.value is not None and f != NO_FINDING}
    influence = np.array([_find_influence(outputs.p[f], labels[f], known.codes) for f in averaged])
    positives = [result.positives for result in averaged.values()]
    return EvaluationResult(
        results,
        macro=_average(averaged, [1] * len(averaged), found.macro, influence),
        weighted=_average(averaged, positives, found.weighted, influence, "positives"),
    )


def _find_influence(p: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    usable = (labels >= 0) & ~np.isnan(p)
    return auroc_influence(labels[usable], p[usable], codes[usable], int(codes.max()) + 1)


def _stack(arrays: list[np.ndarray], n: int) -> np.ndarray:
    return np.column_stack(arrays) if arrays else np.zeros((n, 0))


def _average(
    results: Mapping[str, FindingResult],
    weights: list[int],
    found: Mapping[str, Interval],
    influence: np.ndarray,
    name: str | None = None,
) -> MeanResult:
    means = {}
    for metric in metrics.RANKING_METRICS:
        values = np.array([result.metrics[metric.key].value for result in results.values()], dtype=np.float64)
        mean = float(np.average(values, weights=weights)) if results else None
        means[metric.key] = Measurement(mean, found[metric.key].low, found[metric.key].high)
    reason = None if results else "no finding has a defined AUROC"
    if results:
        limits = np.array([result.auroc.wilson for result in results.values()], dtype=np.float64)
        values = np.array([result.auroc.value for result in results.values()], dtype=np.float64)
        interval = mean_interval(values, limits, influence, np.array(weights, dtype=np.float64))
        means["auroc"] = replace(means["auroc"], wilson=interval)
    headline = usability.explain_headline([result.fewest_patients for result in results.values()])
    return MeanResult(means, list(results), reason, found["auroc"].undefined, headline, name)


def _report_unscored(labels: np.ndarray) -> FindingResult:
    n, positives = int((labels >= 0).sum()), int((labels == 1).sum())
    reason = "labelled, but the scores have no column for it"
    undefined = {metric.key: Measurement(reason=reason) for metric in metrics.METRICS}
    return FindingResult(n, positives, unscored=n, metrics=undefined, reason=reason)


def _evaluate_finding(
    outputs: ModelOutputs,
    finding: str,
    labels: np.ndarray,
    patients: Patients,
    prevalence: float | None,
    found: Mapping[str, Interval],
    band: RocBand | None,
) -> FindingResult:
    labelled, p, c = labels >= 0, outputs.p[finding], outputs.c.get(finding)
    usable = labelled & ~np.isnan(p)
    y, s = labels[usable], p[usable]
    reason = metrics.undefined_reason(y)
    values: dict[str, tuple[float | None, str | None]] = {
        metric.key: (None if reason else metric.value(y, s), reason) for metric in metrics.RANKING_METRICS
    }
    values |= _compute_rates(outputs.flags.get(finding), labels, prevalence)
    calibrated = labelled & ~np.isnan(c) if c is not None else np.zeros(len(labels), dtype=bool)
    for metric in metrics.PROBABILITY_METRICS:
        value = metric.value(labels[calibrated], c[calibrated]) if c is not None else None
        values[metric.key] = value, "no calibrated probabilities"
    wilson = _find_share_intervals(outputs.flags.get(finding), labels, patients.codes)
    wilson["auroc"] = auroc_interval(y, s, patients.codes[usable])
    measured = {
        key: Measurement(reason=why)
        if value is None
        else Measurement(value, found[key].low, found[key].high, None, found[key].reason, wilson.get(key))
        for key, (value, why) in values.items()
    }
    point = outputs.operating_points.get(finding) or {}
    with_finding, without = (patients[usable][y == label] for label in (1, 0))
    variance = delong(y, s) if reason is None else None
    return FindingResult(
        n=len(y),
        positives=int(y.sum()),
        unscored=int((labelled & np.isnan(p)).sum()),
        metrics=measured,
        positive_patients=with_finding.number,
        fewest_patients=min(with_finding.units, without.units),
        prevalence=float(y.mean()) if len(y) else None,
        reason=reason,
        caution=_caution(measured["auroc"], with_finding, without),
        delong=logit_interval(*variance) if variance else None,
        undefined_resamples=found["auroc"].undefined,
        threshold=finite_or_none(point.get("threshold")),
        rule=point.get("rule"),
        expected_flag_rate=finite_or_none(outputs.expected_flag_rates.get(finding)),
        assumed_prevalence=prevalence,
        mean_calibrated=float(c[calibrated].mean()) if c is not None and calibrated.any() else None,
        roc_band=band,
    )


def _caution(auroc: Measurement, with_finding: Patients, without: Patients) -> str | None:
    """Explain why AUROC's interval should be read with caution."""
    if auroc.value is None:
        return None
    few, kind = min((with_finding, "positive"), (without, "negative"), key=lambda pair: pair[0].units)
    if few.units < FEW_PATIENTS:
        unit = "patient" if few.has_id.all() else "image" if not few.has_id.any() else "patient or image without an id"
        count = f"only {few.units} {kind} {unit}s" if few.units > 1 else f"only one {kind} {unit}"
        return f"{count}, so AUROC's interval is a rough estimate"
    if auroc.value in (0.0, 1.0):
        return (
            "the scores separate the classes completely, so AUROC's interval depends on the numbers of patients alone"
        )
    return None


def _compute_rates(
    flags: np.ndarray | None, labels: np.ndarray, prevalence: float | None
) -> dict[str, tuple[float | None, str | None]]:
    """Return each rate at the operating point, with the reason if it is None."""
    judged = (labels >= 0) & (flags >= 0) if flags is not None else np.zeros(len(labels), dtype=bool)
    if flags is None or not judged.any():
        has_flags = flags is not None and bool((flags >= 0).any())
        reason = "no operating point" if (labels >= 0).any() and not has_flags else "no labelled images"
        return {metric.key: (None, reason) for metric in metrics.RATE_METRICS}
    cells = metrics.confusion(labels[judged], flags[judged] == 1)
    rates: dict[str, tuple[float | None, str | None]] = {}
    for metric in metrics.RATE_METRICS:
        if metric.at_prevalence and prevalence is None:
            rates[metric.key] = None, "no prevalence was given"
            continue
        reason = metric.undefined
        if metric.at_prevalence and (cells.sensitivity is None or cells.specificity is None):
            reason = "no positive images" if cells.sensitivity is None else "no negative images"
        rates[metric.key] = metric.value(cells, np.nan if prevalence is None else prevalence), reason
    return rates


def _find_share_intervals(
    flags: np.ndarray | None, labels: np.ndarray, codes: np.ndarray
) -> dict[str, tuple[float, float] | None]:
    """Compute the interval of each rate that is a share of images, if it has any images."""
    judged = (labels >= 0) & (flags >= 0) if flags is not None else np.zeros(len(labels), dtype=bool)
    if flags is None or not judged.any():
        return {}
    found: dict[str, tuple[float, float] | None] = {}
    for metric in metrics.RATE_METRICS:
        if metric.share:
            successes, among = metric.share(labels[judged] == 1, flags[judged] == 1)
            found[metric.key] = (
                clustered_share_interval(successes[among], codes[judged][among]) if among.any() else None
            )
    return found
