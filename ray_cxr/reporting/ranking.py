"""How a score table ranks its images, and the same for studies: a finding's highest probability over the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation.ranking import RankedFindings, combine, sum_logs

_OLD = (
    "An older version wrote these scores: their priority is the highest rank of a finding relative to its operating "
    "point. Abnormality is computed here. Score the images again for the priority of this version."
)
_OWN = "The priority is that of the score table; abnormality is computed here from its probabilities."
_COMPUTED = (
    "The table has no priority. Abnormality and priority are computed here: 1 - product of (1 - {0}) over the "
    "findings, which takes {0} as the probabilities of independent findings."
)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The probabilities that abnormality combines, and the weights of the findings in the priority.

    Attributes:
        values: float64 [n,F], a column per ranked finding, NaN for null.
        weights: None if the priority was not computed by the formula of this version.
        notes: what a reader must know about the order of images.
    """

    findings: RankedFindings
    values: np.ndarray
    weights: dict[str, float] | None
    notes: tuple[str, ...]

    @classmethod
    def build(
        cls,
        p: Mapping[str, np.ndarray],
        c: Mapping[str, np.ndarray],
        run: Mapping[str, Any],
        *,
        columns: frozenset[str],
        is_own: bool,
    ) -> Ranking:
        """Build the ranking of a table with these `columns`.

        Args:
            p, c: per finding, raw and calibrated, float64 [n], NaN for null and on error rows.
            run: `run.json`.
        """
        ranked = RankedFindings.choose(list(p), [name for name in c if np.isfinite(c[name]).any()])
        chosen = [(c if ranked.is_calibrated else p)[name] for name in ranked.names]
        values = np.column_stack(chosen) if chosen else np.full((len(next(iter(p.values()))), 0), np.nan)
        recorded = run.get("ranking") or {}
        weights = ranked.list_weights(recorded.get("weights") or {}) if recorded or "priority" not in columns else None
        scored = np.isfinite(np.column_stack(list(p.values()))).any()
        notes = [ranked.note] if ranked.note is not None and scored else []
        if "priority" not in columns:
            notes.append(_COMPUTED.format("c" if ranked.is_calibrated else "p"))
        elif not is_own:
            notes.append(_OWN)
        elif "abnormality" not in columns:
            notes.append(_OLD)
        if not ranked.names:  # only No_Finding
            notes = []
        return cls(ranked, values, weights, tuple(notes))

    def rank(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return abnormality, priority and top finding of rows [m,F]: NaN and None without a probability.

        The priority is NaN if its weights are unknown.
        """
        abnormality = combine(values)
        if not len(self.findings.names):
            return abnormality, abnormality.copy(), np.full(len(values), None)
        weights = None if self.weights is None else list(self.weights.values())
        priority = np.full(len(values), np.nan) if self.weights is None else combine(values, weights)
        top = np.array(self.findings.names, dtype=object)[np.nan_to_num(values, nan=-1.0).argmax(axis=1)]
        top[np.isnan(abnormality)] = None
        return abnormality, priority, top

    def rank_groups(
        self, codes: np.ndarray, n_groups: int, rows: np.ndarray, priority: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return abnormality, priority and top finding of groups of images, such as studies.

        A finding's probability in a group is the highest over its images. If the weights are unknown, the priority of a
        group is the highest of its images.

        Args:
            codes: the group of each image, int [m] in 0..n_groups-1.
            rows: the images' rows in the table, int [m].
            priority: of all images of the table, float64 [n].
        """
        abnormality, combined, top = self.rank(self._find_highest(codes, n_groups, rows))
        if self.weights is None:
            np.fmax.at(combined, codes, priority[rows])
        return abnormality, combined, top

    def order_groups(self, codes: np.ndarray, n_groups: int, rows: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Return a value per group that orders like the priority of `rank_groups`, but does not round near 1."""
        if self.weights is not None:
            return sum_logs(self._find_highest(codes, n_groups, rows), list(self.weights.values()))
        return find_highest(priority[rows], codes, n_groups)

    def _find_highest(self, codes: np.ndarray, n_groups: int, rows: np.ndarray) -> np.ndarray:
        return find_highest(self.values[rows], codes, n_groups)


def find_highest(values: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Return the highest value of each group of rows, float64 [n_groups, ...], NaN without one.

    Args:
        values: float [m, ...], NaN for null.
        codes: the group of each row, int [m] in 0..n_groups-1.
    """
    highest = np.full((n_groups, *values.shape[1:]), np.nan)
    np.fmax.at(highest, codes, values)
    return highest


def group_studies(patients: np.ndarray, studies: np.ndarray) -> tuple[np.ndarray, int]:
    """Number studies, int64 [n], by first appearance, and count them; each image without a study id is a study."""
    numbers: dict[object, int] = {}
    pairs = enumerate(zip(patients, studies, strict=True))
    keys = (row if study is None else (patient or "", study) for row, (patient, study) in pairs)
    codes = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64, count=len(studies))
    return codes, len(numbers)
