"""The report's page: one file with everything in it, which asks no network for anything.

All text passes jinja2's autoescape: an image id may hold anything a file name may.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ray_cxr.reporting import plots


def render(view: Mapping[str, Any]) -> str:
    """The page from what `report.write_report` gathered; every name the template uses must be there.

    Raises:
        jinja2.UndefinedError: a name is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # always: jinja2's own rule goes by the ending and would not know .j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(num=num, percent=percent, count=count, spaced=plots.spaced, png=_png)
    return environment.get_template("report.html.j2").render(view)


def num(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits; an en dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent; an en dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def count(value: int | None) -> str:
    """A whole number with thousands separated; an en dash for None."""
    return "–" if value is None else f"{value:,}"


def _png(data: bytes) -> Markup:
    # Base64 holds no character that HTML could misread.
    return Markup("data:image/png;base64," + base64.b64encode(data).decode("ascii"))
