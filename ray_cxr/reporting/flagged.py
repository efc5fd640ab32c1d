"""What needs a look: flagged images, studies and patients, and images whose scores are missing or doubtful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.errors import ERROR_CODES
from ray_cxr.evaluation.usability import flag_any
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.imaging.views import parse_view
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting import plots
from ray_cxr.reporting.evaluation_set import EvaluationSet, Population
from ray_cxr.reporting.html import capitalise, format_percent
from ray_cxr.reporting.scores import Scores

#: Findings that a sentence names, and images with a quality flag that are named if they are more than `_ALL`.
_NAMED, _ALL = 3, 10


@dataclass(frozen=True)
class FlagCount:
    """Flagged images, studies and patients of a finding, or of any finding.

    Attributes:
        images: number of flagged images of `n` with a known flag.
        studies, patients: those with a flagged image; `number` is None if no such image has an id.
    """

    images: int
    n: int
    studies: PatientCount
    patients: PatientCount

    @classmethod
    def count(cls, flags: np.ndarray, studies: np.ndarray, patients: np.ndarray) -> FlagCount:
        """Count from flags, int8 [n] with -1 for null, and ids [n] or None."""
        chosen = flags == 1
        of_studies, of_patients = (PatientCount.of(ids[chosen]) for ids in (studies, patients))
        return cls(int(chosen.sum()), int((flags >= 0).sum()), of_studies, of_patients)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> FlagCount:
        """Return the count that `to_json` described."""
        groups = (("studies", "images_without_study"), ("patients", "images_without_patient"))
        return cls(plain["images"], plain["n"], *(PatientCount(plain[name], plain[rest]) for name, rest in groups))

    def describe(self) -> str:
        """Return the count as a line: `135 of 540 scored images (studies unknown, 129 patients)`."""
        return f"{self.images:,} of {count_of(self.n, 'scored image')} ({format_groups(self)})"

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "n": self.n,
            "share": self.images / self.n,
            "studies": self.studies.number,
            "patients": self.patients.number,
            "images_without_study": self.studies.without_id,
            "images_without_patient": self.patients.without_id,
        }


@dataclass(frozen=True)
class Flagged:
    """The images of a report that need a look.

    Attributes:
        description: of the images, for readers.
        images: number of images, failed ones included.
        studies, patients: of the images with a score.
        total: images with a flag for any finding; None if no finding can be flagged, for the `reason`.
        findings: by finding, most images first; only findings with flags.
        without_flags: findings that cannot be flagged.
        failed: images that could not be scored, by code.
        quality: images with a quality flag, by flag.
        overlap: number of images with a quality flag that also have a flag for a finding.
        doubtful: ids of these images by flag, of the first of them if there are many.
        stated: number of images with the flag `lateral` whose view is stated; the others are guesses from pixels.
    """

    description: str
    images: int
    studies: PatientCount
    patients: PatientCount
    total: FlagCount | None
    findings: dict[str, FlagCount]
    without_flags: tuple[str, ...]
    failed: dict[str, int]
    quality: dict[str, int]
    overlap: int
    doubtful: dict[str, list[str]]
    stated: int
    reason: str | None

    @property
    def need_look(self) -> int:
        """Number of images that are flagged, have a quality flag or could not be scored, each counted once."""
        flagged = self.total.images if self.total else 0
        return flagged + sum(self.quality.values()) - self.overlap + sum(self.failed.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "description": self.description,
            "images": self.images,
            "studies": self.studies.number,
            "patients": self.patients.number,
            "images_without_study": self.studies.without_id,
            "images_without_patient": self.patients.without_id,
            "need_look": self.need_look,
            "any_finding": self.total.to_json() if self.total else None,
            "reason": self.reason,
            "findings": {finding: found.to_json() for finding, found in self.findings.items()},
            "without_flags": list(self.without_flags),
            "failed": {"images": sum(self.failed.values()), "by_code": self.failed},
            "quality_flags": {
                "images": sum(self.quality.values()),
                "also_flagged": self.overlap,
                "by_flag": self.quality,
                "first_images": self.doubtful,
                "stated_lateral": self.stated,
            },
        }


def identify_studies(studies: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Return ids of studies that differ between patients, because a study id is unique within a patient only."""
    ids = zip(patients, studies, strict=True)
    return np.fromiter((None if study is None else (patient, study) for patient, study in ids), object, len(studies))


def measure_flagged(table: Scores, population: Population) -> Flagged:
    """Count the images of a report that are flagged, failed, or have a quality flag."""
    rows, patients = population.rows, population.patients
    studies = identify_studies(table.studies[rows], table.patients[rows])
    names = [finding for finding in table.findings if finding != NO_FINDING]
    flags = {f: table.flags[f][rows] for f in names if f in table.flags and (table.flags[f][rows] >= 0).any()}
    counts = {finding: FlagCount.count(values, studies, patients) for finding, values in flags.items()}
    any_flag = flag_any(flags, len(rows))
    codes = Counter(code or "unknown" for code in table.codes[population.failed])
    return Flagged(
        description=population.description if isinstance(population, EvaluationSet) else "all images of the scores",
        images=len(population.listed),
        studies=PatientCount.of(studies),
        patients=PatientCount.of(patients),
        total=FlagCount.count(any_flag, studies, patients) if flags else None,
        findings=dict(sorted(counts.items(), key=lambda pair: -pair[1].images)),
        without_flags=tuple(finding for finding in names if finding not in flags) if len(rows) else (),
        failed={code: codes[code] for code in [*ERROR_CODES, *sorted(set(codes) - set(ERROR_CODES))] if codes[code]},
        quality=dict(sorted(Counter(flag for flag in table.quality_flags[rows] if flag).items())),
        overlap=sum(bool(flag) for flag in table.quality_flags[rows][any_flag == 1]),
        doubtful=_list_doubtful(table, rows),
        stated=int(_is_stated(table, rows).sum()),
        reason=None if flags else explain_no_flags(len(rows)),
    )


def _list_doubtful(table: Scores, rows: np.ndarray) -> dict[str, list[str]]:
    """Return the ids of the images with each quality flag, of the first `_NAMED` if there are more than `_ALL`.

    Images whose lateral view is stated are last.
    """
    found: dict[str, list[str]] = {}
    rows = rows[table.quality_flags[rows] != None]  # noqa: E711, an array of str or None
    stated = _is_stated(table, rows)
    for row in (*rows[~stated], *rows[stated]):
        found.setdefault(str(table.quality_flags[row]), []).append(str(table.ids[row]))
    return {flag: ids if len(ids) <= _ALL else ids[:_NAMED] for flag, ids in sorted(found.items())}


def _is_stated(table: Scores, rows: np.ndarray) -> np.ndarray:
    """Return which rows [n] have the flag `lateral` because the manifest or the header states this view."""
    pairs = zip(table.quality_flags[rows], table.views[rows], strict=True)
    return np.array([flag == "lateral" and parse_view(view or "") == "LATERAL" for flag, view in pairs], dtype=bool)


def explain_no_flags(n_scored: int) -> str:
    """Return the reason why no image is or can be flagged."""
    if not n_scored:
        return "no image was scored"
    return "the scores have neither flags nor a model with operating points"


def summarize_flagged(found: Flagged) -> str:
    """Return a sentence on the images that need a look."""
    parts = []
    if found.total is not None:
        total = found.total
        parts.append(
            f"{total.images:,} of {count_of(total.n, 'scored image')} ({format_percent(total.images / total.n)}) "
            f"{'is' if 1 in (total.images, total.n) else 'are'} flagged ({format_groups(total)})"
        )
        named = [f"{plots.format_finding(f)} {count.images:,}" for f, count in found.findings.items() if count.images]
        if named:
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            parts[0] += f": {', '.join(named[:_NAMED])}{more}"
    else:
        parts.append(f"no finding can be flagged, because {found.reason}")
    if found.failed:
        parts.append(f"{count_of(sum(found.failed.values()), 'image')} could not be scored")
    if found.quality:
        n = sum(found.quality.values())
        also = "" if found.total is None else f", {_describe_overlap(found.overlap, n)}"
        parts.append(f"{count_of(n, 'image')} with a quality flag{also}")
    once = ", each counted once" if found.overlap else ""
    look = f"{found.need_look:,} of {count_of(found.images, 'image')}{once}"
    return f"What needs a look: {look}. {capitalise('; '.join(parts))}."


def _describe_overlap(overlap: int, n: int) -> str:
    """Say how many of n images with a quality flag also have a flag for a finding."""
    if n == 1:
        return "which is also flagged" if overlap else "which is not flagged"
    return f"{'none' if not overlap else 'all' if overlap == n else f'{overlap:,}'} of them also flagged"


def format_groups(count: FlagCount) -> str:
    """Return the studies and patients of a count, for a sentence."""
    if count.studies.number is None and count.patients.number is None and count.images:
        return "studies and patients unknown"
    groups = ((count.studies, "study"), (count.patients, "patient"))
    return ", ".join(found.name(noun, " and {}") for found, noun in groups)
