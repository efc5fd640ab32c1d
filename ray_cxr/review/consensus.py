"""Labels from the verdicts of one or several readers: a manifest, its disagreements, and the readers' agreement."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ray_cxr.data import identity, manifest
from ray_cxr.data.review_facts import ReviewFacts
from ray_cxr.errors import InputError
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting.spreadsheets import format_csv
from ray_cxr.review.index import ReviewIndex, read_index
from ray_cxr.review.verdicts import Verdict, read_verdicts
from ray_cxr.storage import atomic, remote

Rule = Literal["majority", "unanimous"]
DISAGREEMENTS = "disagreements.csv"


@dataclass(frozen=True)
class Disagreement:
    """A finding of an image on which readers differ (`kind` readers), or the readers' label and the model's flag."""

    kind: Literal["readers", "model"]
    row: int
    finding: str
    label: int | None
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class FindingReviews:
    """The labels of one finding.

    Attributes:
        labels, present: numbers of labels, and of those that are 1.
        compared, against_model: labels of images with a flag, and those that differ from it.
        undecided: images with verdicts that give no label: unsure, or readers differ.
        kappa: Cohen's kappa between readers, the mean over pairs of readers; None if it is undefined.
        pairs: images that two readers labelled, summed over the pairs.
    """

    labels: int
    present: int
    compared: int
    against_model: int
    undecided: int
    kappa: float | None
    pairs: int


@dataclass(frozen=True)
class Reviews:
    """The label table of all verdicts of a run, with counts per finding."""

    table: pa.Table
    facts: ReviewFacts
    findings: Mapping[str, FindingReviews]
    disagreements: Sequence[Disagreement]
    not_in_run: int


def write_reviews(scores: str | Path, out: str | Path, rule: Rule = "majority") -> Reviews:
    """Combine the verdicts of a run to a label table, and write it with its disagreements in the same folder.

    Raises:
        InputError: the run has no verdict, or a file of verdicts is damaged.
    """
    index = read_index(scores)
    verdicts = read_verdicts(index.scores)
    if not verdicts:
        raise InputError(f"{scores}: has no verdicts; record some with `ray-cxr review {scores}`")
    reviews = combine_verdicts(index, verdicts, rule)
    if not len(reviews.table):
        raise InputError(f"{scores}: its {len(verdicts):,} verdicts give no label: all are unsure, undone or disputed")
    out = remote.to_path(out)
    manifest.write_manifest(reviews.table, out)
    atomic.write_text(out.with_name(DISAGREEMENTS), _format_disagreements(index, reviews.disagreements))
    return reviews


def combine_verdicts(index: ReviewIndex, verdicts: Sequence[Verdict], rule: Rule) -> Reviews:
    """Return the labels that follow from verdicts, the oldest first, under a rule."""
    rows = identity.find_ids([verdict.image_id for verdict in verdicts], index.ids.to_pylist())
    votes: dict[tuple[int, str], dict[str, Verdict]] = defaultdict(dict)
    for verdict, row in zip(verdicts, rows, strict=True):
        if row >= 0 and verdict.finding in index.findings:
            # The last record of a reader counts.
            votes[int(row), verdict.finding][verdict.reader] = verdict
    labels: dict[tuple[int, str], int | None] = {}
    disagreements: list[Disagreement] = []
    for key in list(votes):
        votes[key] = {name: vote for name, vote in votes[key].items() if vote.verdict != "undone"}
        if not votes[key]:
            del votes[key]
            continue
        given = list(votes[key].values())
        labels[key] = label = apply_rule([vote.present for vote in given], rule)
        if len({vote.present for vote in given} - {None}) > 1:
            disagreements.append(Disagreement("readers", *key, label, given))
        flag = _get_flag(index, *key)
        if label is not None and flag is not None and flag != label:
            disagreements.append(Disagreement("model", *key, label, given))
    disagreements.sort(key=lambda found: (found.kind, int(index.study_of[found.row]), found.row, found.finding))
    findings = {
        name: _count_finding(index, name, votes, labels)
        for name in index.findings
        if any(finding == name for _, finding in labels)
    }
    facts = _collect_facts(index, votes, labels, rule)
    return Reviews(_build_table(index, labels, facts), facts, findings, disagreements, int((rows < 0).sum()))


def apply_rule(present: Sequence[int | None], rule: Rule) -> int | None:
    """Return the label from the values of all readers: 1, 0, or None without one; a None (unsure) is no vote.

    `majority` takes the value of more readers, and None for a tie. `unanimous` takes the value of all readers, and None
    if one of them is unsure or differs.
    """
    if rule == "unanimous":
        return present[0] if len(set(present)) == 1 else None
    difference = present.count(1) - present.count(0)
    return None if difference == 0 else int(difference > 0)


def _get_flag(index: ReviewIndex, row: int, finding: str) -> int | None:
    value = int(index.flags[finding][row]) if finding in index.flags else -1
    return None if value < 0 else value


def _count_finding(
    index: ReviewIndex,
    name: str,
    votes: Mapping[tuple[int, str], Mapping[str, Verdict]],
    labels: Mapping[tuple[int, str], int | None],
) -> FindingReviews:
    own = {row: label for (row, finding), label in labels.items() if finding == name}
    flags = {row: _get_flag(index, row, name) for row, label in own.items() if label is not None}
    compared = [row for row, flag in flags.items() if flag is not None]
    kappa, pairs = measure_agreement([votes[row, name] for row in own])
    return FindingReviews(
        labels=len(flags),
        present=sum(label == 1 for label in own.values()),
        compared=len(compared),
        against_model=sum(flags[row] != own[row] for row in compared),
        undecided=len(own) - len(flags),
        kappa=kappa,
        pairs=pairs,
    )


def measure_agreement(images: Sequence[Mapping[str, Verdict]]) -> tuple[float | None, int]:
    """Return Cohen's kappa, the mean over pairs of readers, and the number of image pairs it is computed from.

    A pair of readers counts if its kappa is defined, which needs two values among their labels of common images.
    """
    from sklearn.metrics import cohen_kappa_score

    readers = sorted({name for votes in images for name in votes})
    kappas, total = [], 0
    for first, second in itertools.combinations(readers, 2):
        both = [(votes[first].present, votes[second].present) for votes in images if {first, second} <= votes.keys()]
        both = [pair for pair in both if None not in pair]
        total += len(both)
        if len({value for pair in both for value in pair}) == 2:
            kappa = float(cohen_kappa_score(*zip(*both, strict=True), labels=[0, 1]))
            if not math.isnan(kappa):
                kappas.append(kappa)
    return (float(np.mean(kappas)) if kappas else None), total


def _collect_facts(
    index: ReviewIndex,
    votes: Mapping[tuple[int, str], Mapping[str, Verdict]],
    labels: Mapping[tuple[int, str], int | None],
    rule: Rule,
) -> ReviewFacts:
    decided = {key: list(votes[key].values()) for key, label in labels.items() if label is not None}
    given = [vote for votes_of_label in decided.values() for vote in votes_of_label]
    flags: dict[str, set[int | None]] = defaultdict(set)
    for row, finding in decided:
        flags[finding].add(_get_flag(index, row, finding))
    return ReviewFacts(
        rule=rule,
        readers=len({vote.reader for vote in given}),
        images=len({row for row, _ in decided}),
        labels=len(decided),
        anchored=sum(not all(vote.blind for vote in votes_of_label) for votes_of_label in decided.values()),
        labels_visible=sum(any(vote.labels for vote in votes_of_label) for votes_of_label in decided.values()),
        images_not_sampled=len({vote.image_id for vote in given if vote.sample is None}),
        samples=sorted({vote.sample for vote in given if vote.sample is not None}),
        flagged_only=[name for name in index.findings if flags[name] == {1}],
    )


def _build_table(index: ReviewIndex, labels: Mapping[tuple[int, str], int | None], facts: ReviewFacts) -> pa.Table:
    """Return a manifest of the images with a label. Ids come from the score table, which may hold pseudonyms."""
    rows = sorted({row for (row, _), label in labels.items() if label is not None})
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in manifest.SCHEMA.names}
    arrays = {"image_id": index.ids, "path": index.paths, "patient_id": index.patients, "study_id": index.studies}
    columns |= {name: array.take(pa.array(rows, pa.int64())).to_pylist() for name, array in arrays.items()}
    columns |= {name: [index.categories[name].get(row) for row in rows] for name in ("sex", "view", "split")}
    columns["age"] = [None if np.isnan(index.ages[row]) else float(index.ages[row]) for row in rows]
    for name in index.findings:
        columns[name] = [labels.get((row, name)) for row in rows]
    if NO_FINDING not in index.findings and set(index.findings) >= set(FINDINGS):
        columns[NO_FINDING] = [_derive_no_finding([columns[name][i] for name in FINDINGS]) for i in range(len(rows))]
    return pa.table(columns, manifest.SCHEMA.with_metadata(facts.to_metadata()))


def _derive_no_finding(values: Sequence[int | None]) -> int | None:
    """Return 0 if a finding is present, 1 if all are absent, and None if that is unknown."""
    return 0 if 1 in values else None if None in values else 1


def _format_disagreements(index: ReviewIndex, found: Sequence[Disagreement]) -> str:
    rows = [each.row for each in found]
    missing = np.full(len(index.ids), np.nan, dtype=np.float32)
    columns: dict[str, Sequence[str | None] | np.ndarray] = {
        "kind": [each.kind for each in found],
        **{
            name: [array[row].as_py() for row in rows]
            for name, array in (("image_id", index.ids), ("study_id", index.studies), ("patient_id", index.patients))
        },
        "finding": [each.finding for each in found],
        "label": [_format_value(each.label) for each in found],
        "flag": [_format_value(_get_flag(index, each.row, each.finding)) for each in found],
        **{
            name: np.array([values.get(each.finding, missing)[each.row] for each in found], dtype=np.float32)
            for name, values in (("p", index.p), ("c", index.c))
        },
        "verdicts": [
            "|".join(f"{v.reader}={_format_value(v.present) or 'unsure'}" for v in each.verdicts) for each in found
        ],
        "notes": ["|".join(f"{v.reader}: {v.note}" for v in each.verdicts if v.note) for each in found],
    }
    return format_csv(columns)


def _format_value(value: int | None) -> str:
    return "" if value is None else str(value)
