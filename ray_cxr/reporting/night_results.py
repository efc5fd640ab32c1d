"""What each night held, and whether it differs from the earlier nights and from what the bundle expects.

`evaluation.drift` makes every comparison. A night is compared with all earlier ones together as one question, "did
anything change?": the levels of flagged shares, scores, quality flags and errors are corrected for being four kinds, so
that at most 5% of the nights without a change are called changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_cxr.evaluation import drift
from ray_cxr.evaluation.drift import (
    DIFFERS,
    INCONCLUSIVE,
    LARGE,
    LEVEL,
    UNKNOWN,
    Drift,
    Expected,
    RateDrift,
    ScoreDrift,
)
from ray_cxr.evaluation.quality import name_flag
from ray_cxr.imaging.demographics import count_of
from ray_cxr.reporting import plots
from ray_cxr.reporting.evaluation_set import Population
from ray_cxr.reporting.flagged import Flagged, measure_flagged
from ray_cxr.reporting.html import format_percent
from ray_cxr.reporting.nights import NightTable
from ray_cxr.reporting.scores import Scores

#: Verdicts on the change of a night.
CHANGED, UNCHANGED, UNTESTED = "changed", "no change", "not testable"
#: Flags, scores, quality flags and errors.
_KINDS = 4
#: Differences that a sentence names.
_NAMED = 4
_RATE = ("n", "observed", "low", "high", "expected", "difference", "difference_low", "difference_high", "tolerance")
_SCORE = ("n", "psi", "psi_low", "psi_high")
_ALL = ("p_adjusted", "verdict", "reason")


@dataclass(frozen=True)
class NightResult:
    """A night with all of its rows.

    Attributes:
        expected: compared with the bundle.
        earlier: compared with all earlier nights; None for the first night.
        earlier_images: number of images of these.
    """

    source: NightTable
    flagged: Flagged
    expected: Drift
    earlier: Drift | None
    earlier_images: int

    @property
    def name(self) -> str:
        return self.source.night.name

    @property
    def change(self) -> str:
        """`changed`, `no change`, `inconclusive` or `not testable`."""
        verdicts = {row.verdict for _, row in list_comparisons(self.earlier)} - {UNKNOWN}
        if verdicts & {DIFFERS, LARGE}:
            return CHANGED
        return INCONCLUSIVE if INCONCLUSIVE in verdicts else UNCHANGED if verdicts else UNTESTED

    def find_p(self, nights: int) -> float | None:
        """Return the smallest p of a change, corrected for this number of nights; None if nothing was tested."""
        found = [row.p_adjusted for _, row in list_comparisons(self.earlier) if row.p_adjusted is not None]
        return min(1.0, nights * min(found)) if found else None


@dataclass(frozen=True)
class NightResults:
    """All nights, the oldest first."""

    nights: tuple[NightResult, ...]

    @property
    def last(self) -> NightResult:
        return self.nights[-1]

    @property
    def compared(self) -> int:
        """Number of nights that were compared with earlier ones."""
        return sum(night.change != UNTESTED for night in self.nights)

    def to_json(self) -> dict[str, Any]:
        return {
            "words": describe_last(self),
            "replaced_rows": sum(night.source.replaced for night in self.nights),
            "level": LEVEL,
            "compared_with_earlier": self.compared,
            "changed": [night.name for night in self.nights if night.change == CHANGED],
            "changed_over_nights": [
                night.name
                for night in self.nights
                if night.change == CHANGED and (night.find_p(self.compared) or 0.0) < LEVEL
            ],
            "expected_by_chance": LEVEL * self.compared,
            "by_night": [_to_plain(night, self.compared) for night in self.nights],
        }


def measure_nights(tables: Sequence[NightTable]) -> NightResults:
    """Measure nights, the oldest first."""
    findings = tables[0].table.findings
    expected = Expected.from_model(tables[-1].table.model)
    parts = [stack_columns(night.table, np.arange(len(night.table.ids))) for night in tables]
    joined = [np.concatenate(columns) for columns in zip(*(part[:4] for part in parts), strict=True)]
    results, rows = list[NightResult](), 0
    for night, part in zip(tables, parts, strict=True):
        earlier = None
        if rows:
            name = "the earlier night" if len(results) == 1 else f"the {len(results)} earlier nights"
            flags, scores, quality_flags, ok = (column[:rows] for column in joined)
            baseline = Expected.from_images(findings, flags, scores, quality_flags, ok, name)
            baseline = _leave_out_absent(baseline, night.table)
            earlier = drift.measure_drift(baseline, findings, *part, questions=_KINDS)
        flagged = measure_flagged(night.table, Population.select_scored(night.table))
        against = drift.measure_drift(expected, findings, *part)
        results.append(NightResult(night, flagged, against, earlier, rows))
        rows += len(night.table.ids)
    return NightResults(tuple(results))


def _leave_out_absent(baseline: Expected, table: Scores) -> Expected:
    """Expect nothing of quality flags, and of errors, that neither the baseline nor the night has.

    An absent flag is neither a change, nor are the images ever enough to exclude that it became a little more frequent.
    """
    present = set(table.quality_flags)
    return replace(
        baseline,
        quality_rates={name: rate for name, rate in baseline.quality_rates.items() if rate or name in present},
        quality_reason="no image has it",
        error_rate=baseline.error_rate if baseline.error_rate or not table.ok.all() else None,
    )


def stack_columns(table: Scores, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return flags and raw scores [n,F], quality flags, success and patients [n] of rows, for `drift.measure_drift`."""
    flags = [table.flags.get(f, np.full(len(table.ids), np.int8(-1))) for f in table.findings]
    scores = [table.p[finding] for finding in table.findings]
    columns = (np.column_stack(flags), np.column_stack(scores), table.quality_flags, table.ok, table.patients)
    flags_, scores_, quality, ok, patients = (column[rows] for column in columns)
    return flags_, scores_, quality, ok, patients


def list_comparisons(found: Drift | None) -> Iterator[tuple[str, RateDrift | ScoreDrift]]:
    """Yield the comparisons of a night, each with what it compares, for readers; none for None."""
    if found is None:
        return
    yield "images not scored", found.errors
    yield from ((f"flagged share of {plots.format_finding(row.name)}", row) for row in found.flags)
    yield from ((f"scores of {plots.format_finding(row.name)}", row) for row in found.scores)
    yield from ((f"quality flag {name_flag(row.name)}", row) for row in found.quality)


def describe_last(found: NightResults) -> str:
    """Return the answer to "did anything change last night?" in one line."""
    night = found.last
    total, failed = night.flagged.total, sum(night.flagged.failed.values())
    counts = [count_of(night.flagged.images, "image")]
    if total is not None:
        counts.append(f"{total.images:,} flagged ({format_percent(total.images / total.n)})")
    counts.append(f"{failed:,} not scored")
    return f"Last night, {night.name} ({', '.join(counts)}): {describe_change(night, len(found.nights) - 1)}"


def describe_change(night: NightResult, earlier: int) -> str:
    """Return a sentence on the change of a night from `earlier` nights, without its subject."""
    compared = [(name, row) for name, row in list_comparisons(night.earlier) if row.verdict != UNKNOWN]
    before = "the earlier night" if earlier == 1 else f"the {earlier:,} earlier nights"
    if night.change == UNTESTED:
        reasons = {row.reason for _, row in list_comparisons(night.earlier) if row.reason}
        reason = f": {min(reasons)}" if len(reasons) == 1 else ", because the images are too few"
        return f"changes from {before} cannot be tested{reason}."
    if night.change == CHANGED:
        differ = [(name, row) for name, row in compared if row.verdict in (DIFFERS, LARGE)]
        differ.sort(key=lambda pair: (pair[1].verdict != LARGE, pair[1].p_adjusted))
        named = [f"{name}{_format_shares(row)}" for name, row in differ[:_NAMED]]
        more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
        return f"CHANGED from {before}: {', '.join(named)}{more} ({len(differ)} of {len(compared)} comparisons)."
    undecided = sum(row.verdict == INCONCLUSIVE for _, row in compared)
    if undecided:
        few = f"its images are too few to decide {undecided} of {len(compared)} comparisons"
        return f"no change from {before} is shown; {few}."
    return f"no change from {before} in {len(compared)} comparisons of flags, scores, quality and errors."


def summarize_nights(found: NightResults) -> list[str]:
    """Return sentences on all nights: what changed last night, what chance explains, and what the bundle expects."""
    changed = [night.name for night in found.nights if night.change == CHANGED]
    sentences = [describe_last(found)]
    if found.compared > 1:
        listed = f": {', '.join(changed[-_NAMED:])}" if changed else ""
        start = f" (the latest {_NAMED})" if len(changed) > _NAMED else ""
        verb = "differs" if len(changed) == 1 else "differ"
        sentences.append(
            f"{len(changed)} of {count_of(found.compared, 'night')} {verb} from the nights before{listed}{start}. By "
            f"chance alone, up to {LEVEL * found.compared:.1f} would."
        )
    return [*sentences, f"Last night against the bundle. {found.last.expected.summary}"]


def _format_shares(row: RateDrift | ScoreDrift) -> str:
    if isinstance(row, ScoreDrift) or row.expected is None or row.observed is None:
        return ""
    return f" {plots.format_share(row.expected)} → {plots.format_share(row.observed)}"


def _to_plain(night: NightResult, nights: int) -> dict[str, Any]:
    flagged = night.flagged.to_json()
    return {
        "name": night.name,
        "finished": night.source.night.finished,
        "source": night.source.night.source,
        "run": night.source.night.digest,
        "images": flagged["images"],
        "replaced": night.source.replaced,
        "failed": flagged["failed"],
        "quality_flags": flagged["quality_flags"],
        "flagged": flagged["any_finding"],
        "flagged_by_finding": {finding: entry["images"] for finding, entry in flagged["findings"].items()},
        "change": night.change,
        "p_over_nights": night.find_p(nights),
        "expected": _to_plain_drift(night.expected),
        "earlier": None if night.earlier is None else _to_plain_drift(night.earlier),
        "earlier_images": night.earlier_images,
    }


def _to_plain_drift(found: Drift) -> dict[str, Any]:
    kinds: dict[str, Sequence[RateDrift | ScoreDrift]] = {
        "flags": found.flags,
        "scores": found.scores,
        "quality": found.quality,
    }
    plain: dict[str, Any] = {kind: {row.name: _to_plain_row(row) for row in rows} for kind, rows in kinds.items()}
    return plain | {"errors": _to_plain_row(found.errors)}


def _to_plain_row(row: RateDrift | ScoreDrift) -> dict[str, Any]:
    names = (*(_SCORE if isinstance(row, ScoreDrift) else _RATE), *_ALL)
    return {name: getattr(row, name) for name in names}
