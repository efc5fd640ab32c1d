"""Render pages as self-contained files that load nothing from the network.

jinja2 escapes every text of an HTML page, and the filter `md` every text in Markdown, because an image id may contain
any character of a file name. The formatters show None as an en dash.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from ray_cxr.evaluation import drift, quality
from ray_cxr.evaluation.metrics import Metric
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.reporting import cards, cases, plots
from ray_cxr.reporting.plots import Drawing

#: A wider interval of a calibration slope, whose ideal is 1, is not shown.
_WIDEST_SLOPE = 20.0


def render(view: Mapping[str, Any], template: str = "report.html.j2") -> str:
    """Fill a template of this folder with the variables of `view`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=not template.endswith(".md.j2"),  # jinja2's own rule does not know .j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        num=format_number,
        difference=format_difference,
        group=format_group,
        percent=format_percent,
        count=format_count,
        count_of=count_of,
        patients=format_patients,
        headings=list_headings,
        quality_flags=list_quality,
        quality_names=name_quality,
        quality_name=format_quality,
        verdict=drift.WORDS.__getitem__,
        duration=format_duration,
        setting=_format_page_setting,
        md=escape_markdown,
        md_code=escape_around_code,
        code=format_code,
        sentence=capitalise,
        spaced=plots.format_finding,
        drawing=format_drawing,
        png=_encode_png,
        webp=_encode_webp,
        metric=format_metric,
        p=cases.format_p,
        ranges=format_ranges,
        shots=cards.list_shots,
        marks=cards.list_marks,
        has_boxes=cards.has_boxes,
        labels_of=cases.describe_labels,
    )
    environment.tests["wide_slope"] = has_wide_slope
    return environment.get_template(template).render(view)


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with a minus sign, and zero without a sign: `0.812`, `−0.04`, `0.00`."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def format_difference(value: float | None, digits: int = 3) -> str:
    """Format a difference with its sign: `+0.012`, `−0.040`, `0.000`."""
    shown = format_number(value, digits)
    return f"+{shown}" if value is not None and value > 0 and float(shown) else shown


def format_group(value: str) -> str:
    """Format a group of patients with an en dash in ranges of age: `40–59 & F`."""
    return re.sub(r"(?<=\d)-(?=\d)", "–", value)


def format_metric(value: float | None, metric: Metric) -> str:
    return (format_percent if metric.percent else format_number)(value, metric.digits)


def format_percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{format_number(100 * value, digits)}%"


def has_wide_slope(result: Mapping[str, Any]) -> bool:
    """Return whether the interval of a calibration slope is too wide to say anything; the ideal slope is 1."""
    return result["slope_low"] is not None and result["slope_high"] - result["slope_low"] > _WIDEST_SLOPE


def format_ranges(ranges: Sequence[tuple[float, float]]) -> str:
    """Format ranges of thresholds: `0.031% to 1.4%, 5.0%`."""
    ends = [[plots.format_share(end) for end in limits] for limits in ranges]
    return ", ".join(low if low == high else f"{low} to {high}" for low, high in ends)


def format_count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def format_patients(result: Mapping[str, Any]) -> str:
    """Format the counts of a part of metrics.json, e.g. `200 images of 80 patients`."""
    return PatientCount(result["n_patients"], result["images_without_patient"]).describe(result["n_images"])


def list_quality(found: Mapping[str, Any]) -> list[tuple[str, int, str, list[str]]]:
    """List the quality flags of an entry `quality_flags` of metrics.json: name, number, meaning and ids of images.

    `lateral` can be listed twice: guessed from pixels, and stated in the manifest or a header.
    """
    listed = []
    for flag, count in found["by_flag"].items():
        ids, stated = found["first_images"].get(flag, []), found["stated_lateral"] if flag == "lateral" else 0
        guessed = count - stated
        if guessed:
            listed.append((quality.name_flag(flag), guessed, quality.MEANINGS.get(flag, ""), ids[:guessed]))
        if stated:
            listed.append(("lateral", stated, quality.STATED_LATERAL, ids[guessed:]))
    return listed


def name_quality(found: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of images of `list_quality` by name."""
    return {name: count for name, count, _, _ in list_quality(found)}


def format_quality(flags: str) -> str:
    """Format the quality flags of a row of worklist.csv, separated by `|`: `possibly lateral, reoriented`."""
    return ", ".join(map(quality.name_flag, flags.split("|"))) if flags else ""


def list_headings(page: str) -> list[tuple[str, str]]:
    """List the sections of a part of a page as id and title, without what follows a colon."""
    found = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', page, re.DOTALL)
    return [(id, Markup(title).striptags().partition(":")[0]) for id, title in found]


def format_duration(seconds: float | None) -> str:
    """Format a duration: 45 s, 12 min, 3 h 05 min."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def format_setting(value: Any) -> str:
    """Format a setting as in TOML, floats with four digits."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_setting(item) for item in value) + "]"
    return str(value)


def _format_page_setting(value: Any) -> str:
    return re.sub(r"(?<=\de)-|^-(?=\d)", "−", format_setting(value))


def capitalise(text: str) -> str:
    """Capitalise the first letter and keep the rest, such as names, unchanged."""
    return text[:1].upper() + text[1:]


def format_code(text: str) -> Markup:
    """Return a text as HTML, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def escape_markdown(text: str) -> str:
    """Escape a text for Markdown, including table cells."""
    return _escape_marks(" ".join(str(text).split()))


def _escape_marks(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)


def escape_around_code(text: str) -> str:
    """Escape a text for Markdown except what stands between backticks, so that commands can be copied."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if i % 2 else _escape_marks(part) for i, part in enumerate(parts))


def format_drawing(drawing: Drawing, alt: str) -> Markup:
    """Return a figure's HTML, which `alt` describes."""
    if drawing.html is None:
        return Markup('<div><img src="{}" alt="{}"></div>').format(_encode_png(drawing.png), alt)
    return Markup('<div class="drawing" role="img" aria-label="{}">{}</div>').format(alt, drawing.html)


def _encode_png(data: bytes) -> Markup:
    # Base64 contains no character that is special in HTML.
    return Markup("data:image/png;base64," + base64.b64encode(data).decode("ascii"))


def _encode_webp(data: bytes) -> Markup:
    return Markup("data:image/webp;base64," + base64.b64encode(data).decode("ascii"))


def format_spec(spec: Mapping[str, Any]) -> str:
    """Describe the input spec of a model, as `model.json` holds it."""
    if spec.get("tiles"):
        return "; ".join(format_spec(tile) for tile in spec["tiles"])
    return f"{spec['size']} × {spec['size']} pixels, {spec.get('aspect')}, {spec.get('interpolation')}"
