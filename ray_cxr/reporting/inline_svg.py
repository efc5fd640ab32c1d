"""Figures as SVG in a page: they use the page's colours, and the panels of a figure wrap on a narrow page."""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ray_cxr.reporting import plots
from ray_cxr.reporting.plots import Drawing, Piece, Sheet

_log = logging.getLogger(__name__)

#: CSS pixels per point, the unit of matplotlib's SVG.
_PIXELS = 96 / 72
#: Width of a legend's symbol with the gap to its text, in points.
_SYMBOL = 2.9 * plots.LEGEND_TEXT
#: The style sheet defines these variables for light and dark pages.
VARIABLES = {
    "white": "--ground",
    "#ffffff": "--ground",
    plots.INK: "--ink",
    plots.MUTED: "--muted",
    plots.FAINT: "--line",
    plots.GREY: "--grey",
    plots.BLUE: "--blue",
    plots.VERMILION: "--vermilion",
    plots.GREEN: "--green",
    plots.SKY: "--sky",
    plots.ORANGE: "--orange",
    plots.PURPLE: "--purple",
}
_COLOURS = {colour.lower(): f"var({name})" for colour, name in VARIABLES.items()}
_COLOUR = re.compile(r"#[0-9a-f]{6}")
#: The page's font, and a style that the style sheet states once for all elements.
_COMMON = re.compile(r"font-family:[^;]*;? ?|stroke-linejoin: round;? ?")
_REFERENCE = re.compile(r"(?<=#)[\w-]+(?=\)|$| )")
#: Attributes in which two decimals, a fiftieth of a pixel, are enough.
_NUMBERS = ("d", "x", "y", "width", "height", "transform")
_DECIMALS = re.compile(r"(\d\.\d\d)\d+")
#: A phone shows this many parts of a figure, and the others on demand.
_UNFOLDED = 4
#: Left, top, width and height in points.
Box = tuple[float, float, float, float]


def write_figures(folder: Path, names: Sequence[str], figures: Mapping[str, Figure]) -> dict[str, Drawing]:
    """Write figures as PNG and SVG in place of an older report's figures of these names; return them by name."""
    stale = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for path in [path for path in folder.glob("*") if path.name in stale]:
        path.unlink(missing_ok=True)
    drawn = {}
    for name in filter(figures.get, names):
        _log.debug("drawing %s", name)
        figure = figures[name]
        name_parts(figure)
        png, svg = plots.encode_figure(figure)
        (folder / f"{name}.png").write_bytes(png)
        (folder / f"{name}.svg").write_bytes(svg)
        has_radiographs = any(ax.images for ax in figure.axes)
        drawn[name] = Drawing(png, None if has_radiographs else embed_figure(name, figure, svg))
    return drawn


def name_parts(figure: Figure) -> None:
    """Give the artists of a sheet's parts the ids that they will have in the SVG."""
    if isinstance(figure, Sheet):
        artists = dict.fromkeys(artist for part in figure.parts for piece in part for artist in piece.artists)
        for number, artist in enumerate(artists):
            artist.set_gid(f"piece{number}")


def embed_figure(name: str, figure: Figure, svg: bytes) -> Markup:
    """Return the HTML of a figure that was saved as `svg`; `name` makes its ids unique in the page.

    A `Sheet` with parts becomes one SVG element per part, below the entries of its legend.
    """
    root = _parse(svg)
    sheet = next(child for child in root if child.get("id") == "figure_1")
    by_id = {str(element.get("id")): element for element in sheet.iter() if element.get("id")}
    content = [child for child in sheet if child.get("id") != "patch_1"]  # the page draws the ground
    definitions = [child for child in root.iterfind("defs/*") if child.tag != "style"]
    width, height = (72 * size for size in figure.get_size_inches())
    parts = figure.parts if isinstance(figure, Sheet) else []
    if not parts:
        _shorten(root, name)
        # On a page that would make its texts too small, it scrolls.
        frame = Markup('<div style="min-width:{:.0f}px">{}</div>')
        whole = _format_svg((0, 0, width, height), content)
        return _hide(definitions) + frame.format(0.75 * _PIXELS * width, whole)
    legend = by_id.get("legend_1")
    entries = [] if legend is None else _split_legend(legend)
    groups = {key: by_id[key] for part in parts for key in _list_ids(part)}
    is_whole = isinstance(figure, Sheet) and figure.is_whole_on_wide
    _shorten(root, name, groups if is_whole else ())
    html = Markup()
    if is_whole:
        # Each group is stored once and drawn in both arrangements.
        uses = {key: Element("use", href=f"#{group.get('id')}") for key, group in groups.items()}
        replaced = {id(groups[key]): use for key, use in uses.items()}
        definitions += groups.values()
        groups = uses
        start = max((box[1] + box[3] for box, _ in entries), default=0.0)
        rest = [replaced.get(id(child), child) for child in content if child is not legend]
        html = Markup('<div class="whole">{}</div>').format(_format_svg((0, start, width, height - start), rest))
    least = 0.84 * 72 * _PIXELS * min(sum(piece.box[2] for piece in part) for part in parts)
    panels = Markup().join(_format_part(part, groups) for part in parts)
    if len(parts) > _UNFOLDED:
        box = (
            '<input type="checkbox" class="unfold" id="{0}-unfold"><label for="{0}-unfold">Show all {1} panels</label>'
        )
        html = Markup(box).format(name, len(parts)) + html
    html += Markup('<div class="panels" style="--least:{:.0f}px">{}</div>').format(least, panels)
    keys = Markup().join(_format_svg(box, elements) for box, elements in entries)
    return _hide(definitions) + (Markup('<div class="keys">{}</div>').format(keys) if entries else "") + html


def _parse(svg: bytes) -> Element:
    """Parse matplotlib's SVG without namespaces, which HTML does not need."""
    text = svg.decode("utf-8")
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href"))


def _split_legend(legend: Element) -> list[tuple[Box, list[Element]]]:
    """Return the box of each entry in points, and its elements: the symbol, then the text."""
    entries: list[tuple[Box, list[Element]]] = []
    symbol: list[Element] = []
    for element in legend:
        symbol.append(element)
        text = element.find("text") if element.get("id", "").startswith("text") else None
        if text is not None:
            left, base, size = float(text.get("x", 0)), float(text.get("y", 0)), plots.LEGEND_TEXT
            wide = 72 * plots.measure_text(text.text or "", size)
            entries.append(((left - _SYMBOL, base - size, _SYMBOL + wide, 1.35 * size), symbol))
            symbol = []
    return entries


def _list_ids(part: Sequence[Piece]) -> list[str]:
    return [str(artist.get_gid()) for piece in part for artist in piece.artists]


def _format_part(part: Sequence[Piece], groups: Mapping[str, Element]) -> Markup:
    """Return a part as SVG, its pieces side by side."""
    left, top, _, high = part[0].box
    content, across = [], left
    for piece in part:
        group = Element("g", {"transform": f"translate({72 * (across - piece.box[0]):.2f})"})
        group.extend(groups[key] for key in _list_ids([piece]))
        content += [group] if across - piece.box[0] else list(group)
        across += piece.box[2]
    return _format_svg((72 * left, 72 * top, 72 * (across - left), 72 * high), content)


def _format_svg(box: Box, content: Iterable[Element]) -> Markup:
    view = " ".join(f"{value:.1f}" for value in box)
    width, height = (round(_PIXELS * size) for size in box[2:])
    inner = Markup("".join(map(_format, content)))
    return Markup('<svg viewBox="{}" width="{}" height="{}">{}</svg>').format(view, width, height, inner)


def _hide(definitions: Sequence[Element]) -> Markup:
    """Return definitions that the SVG elements after it refer to."""
    inner = Markup("".join(map(_format, definitions)))
    return Markup('<svg class="defs" width="0" height="0"><defs>{}</defs></svg>').format(inner) if inner else inner


def _shorten(root: Element, name: str, used: Collection[str] = ()) -> None:
    """Remove what a page does not need, make ids unique, and use the page's colours."""
    elements = list(root.iter())
    referenced = {key for element in elements for key in _REFERENCE.findall(" ".join(element.attrib.values()))}
    for element in elements:
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value not in referenced and value not in used:
                    del element.attrib[key]
                    continue
                value = f"{name}-{value}"
            elif key == "style":
                value = _COLOUR.sub(lambda found: _COLOURS.get(found[0], found[0]), _COMMON.sub("", value))
            elif key in ("href", "clip-path"):
                value = _REFERENCE.sub(lambda found: f"{name}-{found[0]}", value)
            elif key in _NUMBERS and "scale" not in value:
                value = _DECIMALS.sub(r"\1", value.replace("\n", ""))
            element.set(key, value.strip())


def _format(element: Element) -> str:
    # Outside texts, white space is matplotlib's indentation.
    text = element.text or ""
    inner = str(escape(text if element.tag == "text" else text.strip()))
    inner += "".join(map(_format, element))
    attributes = "".join(f' {key}="{escape(value)}"' for key, value in element.attrib.items() if value)
    # A group without attributes has no effect.
    return f"<{element.tag}{attributes}>{inner}</{element.tag}>" if attributes or element.tag != "g" else inner
