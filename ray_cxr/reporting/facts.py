"""What identifies a report: its date, versions and digests, and what was scored."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any

import ray_cxr
from ray_cxr.imaging import phantoms
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.reporting import html, plots
from ray_cxr.reporting.scores import Scores

_DIGITS = 12


def is_synthetic(info: Mapping[str, Any]) -> bool:
    """Return whether all tables of a manifest describe phantoms; `info` is the description of its split."""
    return {*(info.get("tables") or {})} == {phantoms.TABLE_NAME}


def describe_report(table: Scores, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `report` of metrics.json; `info` is the description of the labels' split."""
    # SOURCE_DATE_EPOCH: reproducible-builds.org, for files that are equal from run to run.
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC) if epoch.isdigit() else None
    return {
        "created": (now or datetime.datetime.now(datetime.UTC)).isoformat(timespec="seconds"),
        "version": ray_cxr.__version__,
        "scored": table.run.get("finished"),
        "scored_with": (table.run.get("versions") or {}).get("ray-cxr"),
        "synthetic": is_synthetic(info) or is_synthetic(table.run.get("split") or {}),
    }


def list_facts(table: Scores, metrics: Mapping[str, Any]) -> list[str]:
    """Return what was scored, and when, in parts of one line."""
    report, flagged, digests = metrics["report"], metrics["flagged"], metrics["digests"]["model"]
    images = count_of(metrics["n_images"], "image")
    names = [table.model.get("backbone"), *(digest[:_DIGITS] for digest in digests)]
    return [
        table.source,
        report["created"][:10],
        metrics["split_label"] or "no labels",
        f"{images}, synthetic" if report["synthetic"] else images,
        PatientCount(flagged["studies"], flagged["images_without_study"]).name("study"),
        str(PatientCount(metrics["n_patients"], metrics["images_without_patient"])),
        "model " + (" ".join(filter(None, names)) or "unknown"),
    ]


def list_model_facts(table: Scores, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the model, the versions and the digests, as pairs of name and value."""
    spec, report, digests = table.model.get("input_spec") or {}, metrics["report"], metrics["digests"]
    facts = [
        ("Report", f"{report['created']}, ray_cxr {report['version']}"),
        ("Scores", ", ".join(filter(None, (report["scored"], _prefix("ray_cxr ", report["scored_with"]))))),
        ("Scoring run, SHA-256 of run.json", digests["run"]),
        ("Bundle, SHA-256", ", ".join(digests["model"])),
        ("Input of the scoring run, SHA-256", digests["input"]),
        ("Labels, SHA-256", digests["labels"]),
        ("Backbone", table.model.get("backbone")),
        ("Input", html.format_spec(spec) if spec.get("size") else None),
        ("Findings", ", ".join(plots.format_finding(finding) for finding in table.findings)),
    ]
    plain = [(name, value) for name, value in sorted(table.provenance.items()) if isinstance(value, (str, int, float))]
    trained, scored = table.provenance.get("precision"), table.run.get("precision")
    steps = (_prefix("trained in ", trained), _prefix("scored in ", scored))
    plain = [(name, value) for name, value in plain if name != "precision"]
    plain.append(("precision", ", ".join(filter(None, steps))))
    names = {"lineage": "All training images", "prepared_digest": "Prepared images, SHA-256"}
    facts += [(names.get(name, str(name).replace("_", " ").capitalize()), value) for name, value in plain]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _prefix(words: str, value: str | None) -> str | None:
    return None if value is None else f"{words}{value}"
