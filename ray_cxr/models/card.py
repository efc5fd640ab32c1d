"""MODEL_CARD.md: what a bundle is, for the people who must decide whether to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(info: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> str:
    """The card in Markdown, from what `bundle.json` and the learning curves hold and nothing else."""
    source = info["provenance"]
    lines = [
        f"# Model card: {info['backbone']} at {info['input_spec']['size']} pixels",
        "",
        "**For research only. Not a medical device; not for diagnosis.**",
        "",
        "## What it is",
        "",
        f"- Input: one frontal chest radiograph, 8-bit gray, {info['input_spec']['size']} pixels square "
        f"(aspect: {info['input_spec']['aspect']}, interpolation: {info['input_spec']['interpolation']}).",
        f"- Output: a probability for each of {', '.join(info['findings'])}.",
        f"- Where it comes from: {source['origin']}.",
        f"- Initial weights: {source['initial_weights']}.",
    ]
    if source.get("split"):
        lines += ["", "## Data", "", f"- Split: {split_words(source['split'])}."]
        for name in ("train", "val"):
            counts = source.get("images", {}).get(name)
            if counts:
                lines.append(f"- {name}: {counts['images']:,} images of {counts['patients']:,} patients.")
        if source.get("age_range"):
            lines.append(f"- Ages in training: {source['age_range'][0]:.0f} to {source['age_range'][1]:.0f} years.")
    if curves:
        lines += ["", f"## Training: {len(curves)} epochs, the best of them epoch {source.get('best_epoch')}"]
    metrics = source.get("validation", {}).get("findings", {})
    if metrics:
        lines += [
            "",
            "## Validation (it chose the epoch, the calibration and the thresholds: not a test)",
            "",
            "| finding | images | positives | AUROC | calibrated | flags above | flag rate |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in info["findings"]:
            row = metrics.get(name, {})
            point = info["operating_points"][name]
            lines.append(
                f"| {name} | {row.get('n', 0):,} | {row.get('positives', 0):,} | {_number(row.get('auroc'))} "
                f"| {'yes' if info['calibration'][name] else 'no: too few positives or negatives'} "
                f"| {_number(point['threshold'], 4) if point else 'none'} "
                f"| {_number(info['expected_flag_rates'][name])} |"
            )
    lines += [
        "",
        "## Limits",
        "",
        "- ChestX-ray14's labels were mined from reports by software; some are wrong.",
        "- Calibration and thresholds hold for patients like those of validation; fit them again on your own.",
        "- A probability says nothing about findings that are not in the list.",
        "",
        "## Versions",
        "",
        *(f"- {name} {version}" for name, version in source.get("versions", {}).items()),
        "",
    ]
    return "\n".join(lines)


def split_words(split: Mapping[str, Any]) -> str:
    """A split's description in words, such as `random by patient, seed 0`."""
    kind = split.get("kind")
    if kind == "official":
        return f"the official train+val list, a tenth of its patients for validation, seed {split.get('seed')}"
    if kind == "patient":
        return f"random by patient, seed {split.get('seed')}, fractions {split.get('fractions')}"
    return "given by the tables" if kind == "given" else "unknown"


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
