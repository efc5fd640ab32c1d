"""metrics.parquet: all of metrics.json as one long table with a row per number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ray_cxr.evaluation import metrics

SCHEMA = pa.schema(
    [
        ("section", pa.string()),  # findings | macro | weighted | subgroups | differences | consensus | compared | ...
        ("finding", pa.string()),  # null: all findings
        ("attribute", pa.string()),  # of a subgroup, such as sex
        ("group", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("positives", pa.int64()),
        ("reason", pa.string()),  # why there is no value or interval
        ("split", pa.string()),
        ("split_kind", pa.string()),
        ("split_seed", pa.int64()),
        ("labels_sha256", pa.string()),
    ]
)


def build_table(result: Mapping[str, Any]) -> pa.Table:
    """Flatten the content of metrics.json; each row has its split and the digest of its labels."""
    split = {name: result[name] for name in ("split", "split_kind", "split_seed")}
    own = split | {"labels_sha256": result["digests"]["labels"]}
    rows = [{**row, **own} for row in _evaluation(result)]
    rows += [{**row, **own} for row in _subgroups(result["subgroups"])]
    rows += [{**row, **own} for row in _compared(result["compared"])]
    for name in ("consensus", "localisation"):
        if result[name] is not None:
            theirs = split | {"labels_sha256": result[name]["digest"]}
            found = _evaluation(result[name], name) if name == "consensus" else _localisation(result[name])
            rows += [{**row, **theirs} for row in found]
    evaluated = split if result["macro"] is not None else dict.fromkeys(split)
    rows += [{**row, **evaluated} for row in _drift(result["drift"])]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _evaluation(result: Mapping[str, Any], section: str | None = None) -> Iterator[dict[str, Any]]:
    for finding, entry in result["findings"].items():
        counts = {"finding": finding, "n": entry["n"], "positives": entry["positives"]}
        for name in (*(metric.key for metric in metrics.METRICS), "prevalence"):
            yield {"section": section or "findings", **counts, **_number(entry, name, entry["undefined"])}
    for kind in ("macro", "weighted"):
        entry = result[kind]
        for name in (metric.key for metric in metrics.RANKING_METRICS if entry is not None):
            row = _number(entry, name, {name: entry["reason"]})
            yield {"section": f"{section} {kind}" if section else kind, "n": result["n_images"], **row}


def _number(entry: Mapping[str, Any], name: str, reasons: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "metric": name,
        "value": entry[name],
        "low": entry.get(f"{name}_low"),
        "high": entry.get(f"{name}_high"),
        "reason": reasons.get(name) or reasons.get(f"{name}_low"),
    }


def _subgroups(found: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    if found is None or "groups" not in found:
        return
    for group in found["groups"]:
        of = {"section": "subgroups", "attribute": group["attribute"], "group": group["value"]}
        for kind in ("own", "shared"):
            for name, mean in group[kind].items():
                yield {**of, "metric": f"mean {name} over {kind} findings", "n": group["n"], **_ends(mean, "value")}
        for finding, cell in group["findings"].items():
            counts = {"finding": finding, "n": cell["n"], "positives": cell["positives"]}
            for name, reason in (("auroc", "reason"), ("sensitivity", "rates_reason"), ("specificity", "rates_reason")):
                given = {name: cell[reason] if cell[name] is None else None, f"{name}_low": cell["interval_reason"]}
                yield {**of, **counts, **_number(cell, name, given)}
    for one in found["differences"]:
        yield {
            "section": "differences",
            "finding": one["finding"],
            "attribute": one["attribute"],
            "group": f"{one['value']} less {one['reference']}",
            "metric": one["quantity"],
            **_ends(one, "difference"),
        }


def _compared(found: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    if found is None:
        return
    for finding, one in found["findings"].items():
        counts = {"finding": finding, "n": one["n"], "positives": one["positives"]}
        yield {"section": "compared", **counts, "metric": "auroc difference", **_ends(one, "difference")}
        yield {"section": "compared", **counts, "metric": "p", "value": one["p"]}
    macro = {"section": "compared", "n": found["n_images"]}
    yield {**macro, "metric": "macro auroc difference", **_ends(found["macro"], "difference")}
    yield {**macro, "metric": "macro p", "value": found["macro"]["p"]}


def _ends(one: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"value": one[name], "low": one["low"], "high": one["high"], "reason": one["reason"]}


def _localisation(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for finding, one in (*found["findings"].items(), (None, found["overall"])):
        of = {"section": "localisation", "finding": finding, "n": one["n"]}
        reasons = {name: one.get(f"{name}_reason") for name in ("hit_rate", "iou")}
        for name in ("hit_rate", "iou"):
            yield {**of, **_number(one, name, reasons)}
        for level, rate in one["accuracy"].items():
            of_level = _number(rate, "accuracy", {"accuracy": rate.get("accuracy_reason")})
            yield {**of, **of_level, "metric": f"IoU >= {level}"}


def _drift(found: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    for finding, one in found["flags"].items() if found is not None else ():
        of = {"section": "drift", "finding": finding, "n": one["n"], "reason": one["reason"]}
        yield {**of, "metric": "flag rate", "value": one["observed"], "low": one["low"], "high": one["high"]}
        yield {**of, "metric": "expected flag rate", "value": one["expected"]}
    for finding, one in found["scores"].items() if found is not None else ():
        of = {"section": "drift", "finding": finding, "n": one["n"], "reason": one["reason"]}
        yield {**of, "metric": "population stability index", "value": one["psi"]}
