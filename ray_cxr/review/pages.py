"""Render the pages. jinja2 escapes every text, because ids, notes and headers may contain any character."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from ray_cxr.reporting.html import format_count, format_number, format_percent
from ray_cxr.reporting.plots import format_finding
from ray_cxr.review.words import describe_code, shorten_id


def render(template: str, **view: Any) -> str:
    """Fill a template of the folder `templates` with the variables of `view`."""
    return _environment().get_template(template).render(view)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(num=format_number, percent=format_percent, count=format_count, spaced=format_finding)
    environment.filters.update(words=describe_code, short=shorten_id)
    return environment
