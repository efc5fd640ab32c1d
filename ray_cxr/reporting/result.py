"""Everything a report states, as typed results; `ReportResult.to_json` is the content of metrics.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ray_cxr.errors import ERROR_CODES
from ray_cxr.evaluation import drift
from ray_cxr.evaluation.alerts import Alerts
from ray_cxr.evaluation.published import Published
from ray_cxr.evaluation.reading_order import ReadingOrder
from ray_cxr.evaluation.subgroups import Subgroups
from ray_cxr.evaluation.underdiagnosis import Underdiagnosis
from ray_cxr.evaluation.usability import Warned
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.reporting.abnormality import RankingResult
from ray_cxr.reporting.cases import MapCount
from ray_cxr.reporting.comparators import BoxResult, ConsensusResult, ScoreComparison
from ray_cxr.reporting.decisions import DECISIONS, Decisions
from ray_cxr.reporting.evaluation_set import EvaluationSet, JoinCounts
from ray_cxr.reporting.flagged import Flagged
from ray_cxr.reporting.leakage import LeakCheck
from ray_cxr.reporting.measures import BootstrapSettings, EvaluationResult
from ray_cxr.reporting.night_results import NightResults, stack_columns
from ray_cxr.reporting.scores import Scores, finite_or_none

#: Sections of metrics.json about labels that follow the settings.
_LABELLED = ("leak_check", "subgroups", "underdiagnosis", "abnormality", "reading_order", "published", *DECISIONS)


@dataclass(frozen=True)
class Counts:
    """Numbers of rows of the score table: all, scored, and failed by error code; and those of the join with labels."""

    rows: int
    scored: int
    errors: int
    by_code: dict[str, int]
    quality_flags: dict[str, int]
    joined: JoinCounts | None

    @classmethod
    def count(cls, table: Scores, joined: JoinCounts | None) -> Counts:
        codes = Counter(code or "unknown" for code in table.codes[~table.ok])
        ordered = [*ERROR_CODES, *sorted(set(codes) - set(ERROR_CODES))]
        return cls(
            rows=len(table.ids),
            scored=int(table.ok.sum()),
            errors=int((~table.ok).sum()),
            by_code={code: codes[code] for code in ordered if codes[code]},
            quality_flags=dict(sorted(Counter(flag for flag in table.quality_flags if flag).items())),
            joined=joined,
        )

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        return plain | (plain.pop("joined") or {})


def measure_flag_rates(table: Scores) -> dict[str, dict[str, Any]]:
    """Return per finding the observed share of flagged images, the share expected from validation, and n images."""
    expected = table.model.get("expected_flag_rates") or {}
    rates = {}
    for finding in table.findings:
        flags = table.flags.get(finding, np.zeros(0, dtype=np.int8))
        known = flags[flags >= 0]
        observed = float(known.mean()) if len(known) else None
        share = finite_or_none(expected.get(finding))
        rates[finding] = {"observed": observed, "expected": share, "n": len(known)}
    return rates


@dataclass(frozen=True)
class DriftResult:
    """Flag rates and scores compared with validation.

    `images` names the images for readers. An evaluation set holds no failed images, so it has no error rate.
    """

    images: str
    measured: drift.Drift
    has_errors: bool

    def to_json(self) -> dict[str, Any]:
        plain = {"images": self.images, **self.measured.to_json()}
        if not self.has_errors:
            del plain["errors"]
        return plain


def measure_drift(table: Scores, evaluated: EvaluationSet | None) -> DriftResult | None:
    """Compare the evaluated images, or without labels all, with validation; None for another system's scores."""
    if not table.is_own:
        return None
    rows = np.arange(len(table.ids)) if evaluated is None else evaluated.rows
    flags, scores, quality_flags, ok, patients = stack_columns(table, rows)
    patients = patients if evaluated is None else evaluated.patients
    expected = drift.Expected.from_model(table.model)
    measured = drift.measure_drift(expected, table.findings, flags, scores, quality_flags, ok, patients)
    images = "all scored images" if evaluated is None else f"the evaluated images ({evaluated.description})"
    return DriftResult(images, measured, has_errors=evaluated is None)


@dataclass(frozen=True)
class LabelResults:
    """The evaluation against labels.

    Attributes:
        subgroups, underdiagnosis, reading_order: the results, or the reason why there are none.
        published: published results, each with the reason why it is not comparable, or None.
    """

    images: EvaluationSet
    leak_check: LeakCheck
    evaluation: EvaluationResult
    subgroups: Subgroups | str
    underdiagnosis: Underdiagnosis | str
    reading_order: ReadingOrder | str
    published: list[tuple[Published, str | None]]
    ranking: RankingResult
    decisions: Decisions

    def to_json(self) -> dict[str, Any]:
        subgroups, missed, order, published = self.subgroups, self.underdiagnosis, self.reading_order, self.published
        return {
            "split_label": self.images.description,
            "split_kind": self.images.info.get("kind"),
            "split_seed": self.images.info.get("seed"),
            "leak_check": self.leak_check.to_json(),
            **self.evaluation.to_json(),
            "subgroups": {"reason": subgroups} if isinstance(subgroups, str) else subgroups.to_json(),
            "underdiagnosis": {"reason": missed} if isinstance(missed, str) else missed.to_json(),
            "abnormality": self.ranking.to_json(),
            "reading_order": {"reason": order} if isinstance(order, str) else order.to_json(),
            "published": [{**paper.to_json(), "comparable": why is None, "reason": why} for paper, why in published],
            **self.decisions.to_json(),
        }


@dataclass(frozen=True)
class ReportResult:
    """A report's results; images and patients are those evaluated, or without labels those scored.

    `leak_check` and `heatmaps` are those of these images.
    """

    split: str | None
    n_images: int
    patients: PatientCount
    labelled: LabelResults | None
    leak_check: LeakCheck
    counts: Counts
    flagged: Flagged
    flag_rates: dict[str, dict[str, Any]]
    drift: DriftResult | None
    nights: NightResults | None
    alerts: Alerts
    digests: dict[str, Any]
    report: dict[str, Any]
    bootstrap: BootstrapSettings | None
    consensus: ConsensusResult | None
    compared: ScoreComparison | None
    boxes: BoxResult | None
    heatmaps: MapCount | None
    warnings: list[Warned]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        keys = ("split_label", "split_kind", "split_seed", "macro", "weighted", *_LABELLED)
        unlabelled = dict.fromkeys(keys) | {"findings": {}, "published": [], "leak_check": self.leak_check.to_json()}
        labelled = self.labelled.to_json() if self.labelled else unlabelled
        return {
            "split": self.split,
            **{key: labelled[key] for key in ("split_label", "split_kind", "split_seed")},
            "n_images": self.n_images,
            "n_patients": self.patients.number,
            "images_without_patient": self.patients.without_id,
            **{key: labelled[key] for key in ("findings", "macro", "weighted")},
            "counts": self.counts.to_json(),
            "flagged": self.flagged.to_json(),
            "flag_rates": self.flag_rates,
            "drift": self.drift.to_json() if self.drift else None,
            "nights": self.nights.to_json() if self.nights else None,
            "alerts": self.alerts.to_json(),
            "digests": self.digests,
            "report": self.report,
            "intervals": self.bootstrap.to_json() if self.bootstrap else None,
            **{key: labelled[key] for key in _LABELLED},
            "consensus": self.consensus.to_json() if self.consensus else None,
            "compared": self.compared.to_json() if self.compared else None,
            "localisation": self.boxes.to_json() if self.boxes else None,
            "heatmaps": asdict(self.heatmaps) if self.heatmaps else None,
            "warnings": [warning.to_json() for warning in self.warnings],
            "notes": self.notes,
        }
