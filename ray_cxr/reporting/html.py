"""The reports' pages: one file each with everything in it, which asks no network for anything.

All text of a page passes jinja2's autoescape, and that of Markdown the filter `md`: an image id may hold anything a
file name may.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ray_cxr.reporting import plots


def render(view: Mapping[str, Any], template: str = "report.html.j2") -> str:
    """A page from what `report.write_report` or `study.write_study` gathered; every name it uses must be there.

    Raises:
        jinja2.UndefinedError: a name is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=not template.endswith(".md.j2"),  # jinja2's own rule goes by the ending and would not know .j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        num=num,
        percent=percent,
        count=count,
        duration=duration,
        setting=setting,
        md=markdown,
        sentence=sentence,
        spaced=plots.spaced,
        png=_png,
    )
    return environment.get_template(template).render(view)


def num(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits; an en dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent; an en dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def count(value: int | None) -> str:
    """A whole number with thousands separated; an en dash for None."""
    return "–" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """A time as a reader says it: 45 s, 12 min, 3 h 05 min; an en dash for None."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def setting(value: Any) -> str:
    """A setting's value as a TOML file would hold it, floats to four digits; an en dash for None."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(setting(item) for item in value) + "]"
    return str(value)


def sentence(text: str) -> str:
    """With a capital first; the rest, names among it, as it is."""
    return text[:1].upper() + text[1:]


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, within a line and within a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def _png(data: bytes) -> Markup:
    # Base64 holds no character that HTML could misread.
    return Markup("data:image/png;base64," + base64.b64encode(data).decode("ascii"))
