"""Parse a report's HTML page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Tags, URLs, ids, text and plotly figures of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.ids: set[str] = set()
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(source)
        self.figures = [json.loads(script) for script in self.scripts if script.startswith("{")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def traces(self) -> list[dict[str, Any]]:
        return [trace for figure in self.figures for trace in figure["data"]]
