"""metrics.parquet: all of metrics.json as one long table with a row per number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ray_cxr.evaluation import metrics
from ray_cxr.reporting.decisions import DECISIONS

#: A row without a finding is about all findings. `attribute` is that of a subgroup, such as sex. `reason` explains a
#: missing value or interval. `interval_low` and `interval_high` are the interval that pages show where it is not low
#: and high; `interval_method` is its method.
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("section", "finding", "attribute", "group", "metric"), pa.string()),
        **dict.fromkeys(("value", "low", "high"), pa.float64()),
        **dict.fromkeys(("n", "positives"), pa.int64()),
        **dict.fromkeys(("reason", "split", "split_kind"), pa.string()),
        "split_seed": pa.int64(),
        "labels_sha256": pa.string(),
        **dict.fromkeys(("interval_low", "interval_high"), pa.float64()),
        "interval_method": pa.string(),
    }
)


def build_table(result: Mapping[str, Any]) -> pa.Table:
    """Flatten the content of metrics.json; each row has its split and the digest of its labels."""
    split = {name: result[name] for name in ("split", "split_kind", "split_seed")}
    consensus, boxes, compared = result["consensus"], result["localisation"], result["compared"]
    subgroups, drift, labels = result["subgroups"] or {}, result["drift"], result["digests"]["labels"]
    sections = [
        (labels, _list_evaluation(result)),
        (labels, _list_subgroups(subgroups) if "groups" in subgroups else ()),
        (labels, _list_underdiagnosis(result["underdiagnosis"] or {})),
        (labels, _list_decisions(result)),
        (labels, _list_comparison(compared) if compared else ()),
        (consensus and consensus["digest"], _list_evaluation(consensus, "consensus") if consensus else ()),
        (boxes and boxes["digest"], _list_localisation(boxes) if boxes else ()),
        (None, _list_drift(drift) if drift else ()),
        (None, _list_nights(result["nights"]) if result["nights"] else ()),
        (None, _list_flagged(result["flagged"])),
        (labels, _list_alerts(result["alerts"])),
        (labels, _list_order(result["reading_order"] or {})),
        (labels, _list_ranking(result["abnormality"]) if result["abnormality"] else ()),
    ]
    rows = [{**row, **split, "labels_sha256": digest} for digest, found in sections for row in found]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _list_evaluation(result: Mapping[str, Any], section: str | None = None) -> Iterator[dict[str, Any]]:
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
        **{column: entry.get(f"{name}_{column}") for column in ("interval_low", "interval_high", "interval_method")},
    }


def _list_subgroups(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for group in found["groups"]:
        names = {"section": "subgroups", "attribute": group["attribute"], "group": group["value"]}
        for kind in ("own", "shared"):
            for name, mean in group[kind].items():
                metric = f"mean {name} over {kind} findings"
                yield {**names, "metric": metric, "n": group["n"], **_estimate(mean, "value")}
        for finding, cell in group["findings"].items():
            counts = {"finding": finding, "n": cell["n"], "positives": cell["positives"]}
            for name, reason in (("auroc", "reason"), ("sensitivity", "rates_reason"), ("specificity", "rates_reason")):
                reasons = {name: cell[reason] if cell[name] is None else None, f"{name}_low": cell["interval_reason"]}
                yield {**names, **counts, **_number(cell, name, reasons)}
    for difference in found["differences"]:
        yield {
            "section": "differences",
            "finding": difference["finding"],
            "attribute": difference["attribute"],
            "group": f"{difference['value']} less {difference['reference']}",
            "metric": difference["quantity"],
            **_estimate(difference, "difference"),
        }


def _list_underdiagnosis(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    whole = {"attribute": None, "value": None, "rates": found.get("overall", {}), "differences": {}}
    for group in (whole, *found.get("groups", ())):
        names = {"section": "underdiagnosis", "attribute": group["attribute"], "group": group["value"]}
        for metric, rate in group["rates"].items():
            yield {**names, "metric": metric, "n": rate["n"], **_estimate(rate, "value")}
        for metric, difference in group["differences"].items():
            other = f"{group['value']} less {difference['reference']}"
            yield {**names, "group": other, "metric": f"{metric} difference", **_estimate(difference, "difference")}


def _list_decisions(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """List calibration, net benefit at every eighth threshold, and rates with and without the least certain tenth."""
    for section in DECISIONS:
        for finding, entry in (result[section] or {}).items():
            if "reason" in entry:
                continue
            counts = {"finding": finding, "n": entry["n"], "positives": entry["positives"]}
            names = {"section": section, **counts}
            if section == "net_benefit":
                for i, threshold in list(enumerate(entry["thresholds"]))[::8]:
                    for name in ("model", "gain"):
                        number = {f"{name}{part}": entry[f"{name}{part}"][i] for part in ("", "_low", "_high")}
                        place = {"group": f"threshold {threshold:.6g}"}
                        yield {**names, **place, **_number(number, name, {})}
                continue
            for name, value in entry.items():
                is_limit = name.endswith(("_low", "_high", "_reason")) or name in ("n", "positives")
                reason = entry.get(f"{name}_reason")
                if not isinstance(value, list) and not is_limit and (value is not None or reason):
                    yield {**names, **_number(entry, name, {name: reason})}


def _list_comparison(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for finding, pair in found["findings"].items():
        counts = {"finding": finding, "n": pair["n"], "positives": pair["positives"]}
        yield {"section": "compared", **counts, "metric": "auroc difference", **_estimate(pair, "difference")}
        yield {"section": "compared", **counts, "metric": "p", "value": pair["p"]}
    macro = {"section": "compared", "n": found["n_images"]}
    yield {**macro, "metric": "macro auroc difference", **_estimate(found["macro"], "difference")}
    yield {**macro, "metric": "macro p", "value": found["macro"]["p"]}


def _estimate(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"value": entry[name], "low": entry["low"], "high": entry["high"], "reason": entry["reason"]}


def _list_localisation(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for finding, entry in (*found["findings"].items(), (None, found["overall"])):
        names = {"section": "localisation", "finding": finding, "n": entry["n"]}
        for name in ("hit_rate", "hit_rate_inside", "iou", "tuned_iou"):
            yield {**names, **_number(entry, name, {name: entry[f"{name}_reason"]})}
        for name in ("ceiling", "ceiling_inside"):
            yield {**names, "metric": name, "value": entry[name], "reason": None if entry["n"] else "no heat map"}
        rates = [(rate, "share", f"IoU >= {level}") for level, rate in entry["iou_at_least"].items()]
        for measure, thresholds in entry["wang"].items():
            for kind, label in (("accuracy", "box accuracy"), ("false_boxes", "false boxes per case")):
                rates += [(rate, kind, f"{label}, {measure} > {level}") for level, rate in thresholds.items()]
        for rate, name, metric in rates:
            yield {**names, **_number(rate, name, {name: rate[f"{name}_reason"]}), "metric": metric}


def _list_drift(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for finding, rate in found["flags"].items():
        names = {"section": "drift", "finding": finding, "n": rate["n"], "reason": rate["reason"]}
        yield {**names, "metric": "flag rate", **_estimate(rate, "observed")}
        yield {**names, "metric": "expected flag rate", "value": rate["expected"]}
    for finding, scores in found["scores"].items():
        names = {"section": "drift", "finding": finding, "n": scores["n"], "reason": scores["reason"]}
        yield {**names, "metric": "population stability index", "value": scores["psi"]}


def _list_nights(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for night in found["by_night"]:
        names, failed = {"section": "nights", "group": night["name"]}, night["failed"]["images"]
        for metric, value in (("images", night["images"]), ("images not scored", failed)):
            yield {**names, "metric": metric, "value": value}
        for finding, rate in night["expected"]["flags"].items():
            row = {**names, "finding": finding, "n": rate["n"], "reason": rate["reason"]}
            yield {**row, "metric": "flag rate", **_estimate(rate, "observed")}
        for finding, scores in night["expected"]["scores"].items():
            row = {**names, "finding": finding, "n": scores["n"], "reason": scores["reason"]}
            yield {**row, "metric": "population stability index", "value": scores["psi"]}


def _list_flagged(flagged: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    counts = {None: flagged["any_finding"], **flagged["findings"]}
    for finding, entry in counts.items():
        for metric in ("images", "share", "studies", "patients") if entry else ():
            yield {"section": "flagged", "finding": finding, "metric": metric, "value": entry[metric], "n": entry["n"]}


def _list_alerts(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for rule in found["rules"]:
        for name, share in rule["shares"].items():
            names = {"section": "alerts", "group": rule["rule"], "metric": name, "n": share["n"]}
            yield {**names, **_estimate(share, "value")}


def _list_ranking(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = ("abnormality_auroc", "priority_auroc")
    levels = [
        (None, f"{level} {name}", found[level][name])
        for level in ("images", "studies")
        for name in names
        if found[level]
    ]
    pairs = [(finding, name, share) for finding, pair in found["findings"].items() for name, share in pair.items()]
    for finding, metric, share in (*levels, (None, "top_finding", found["top_finding"]), *pairs):
        row = {"section": "abnormality", "finding": finding, "metric": metric, "n": share["n"]}
        yield {**row, **_estimate(share, "value")}


def _list_order(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "position" not in found:
        return
    shares = {name: found[name] for name in ("position", "normal_position", "minutes_sooner")}
    shares |= {f"abnormal read in {percent}% of the list": share for percent, share in found["read"].items()}
    for finding, metric, share in (
        *((None, name, share) for name, share in shares.items()),
        *((finding, "position", share) for finding, share in found["findings"].items()),
    ):
        names = {"section": "reading order", "finding": finding, "metric": metric, "n": share["n"]}
        yield {**names, **_estimate(share, "value")}
