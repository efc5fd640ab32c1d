"""The page of a study, its images and heat maps, and the files that pages load.

    GET /study/{number}                 study.html.j2; the query is that of the list, which j and k follow, and `image`,
                                        the row to show
    GET /image/{row}                    PNG, 8-bit gray, in the original size
    GET /thumb/{row}                    JPEG, longer side `images.THUMBNAIL` pixels; an SVG with the reason of a failure
    GET /heatmap/{row}/{finding}        PNG, RGBA, to be stretched over the image
    GET /static/{name}                  a file of `STATIC`

An `/image` that cannot be read answers 404 and {"code", "error"}. An image without a heat map of the finding answers
200 and {"error"}, because most have none. A map that the reader must not see yet answers 403. Unknown rows answer 404.

study.html.j2 gets, in addition to what every template gets:

    number, place       number of the study, and `Place` in the list
    row, rows           the row that is shown, and all rows of the study, by id
    elsewhere           list of (row, findings): the study's other images with a flag that this image does not have
    hidden              the model's output of this image must not be shown
    findings            list of `FindingView`, in the order of the page
    state               `describe_image` of the row
    error               (code, message) of an image that could not be scored, or None
    quality             quality flag of the row, or None
    others              rows of the patient's images in other studies, at most `MAX_OTHERS`; `n_others`: how many
    facts               list of (name, value): what is known about image and run
    has_maps            the run has heat maps
    boxes               boxes of the image, see `session.read_image_boxes`
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.evaluation.calibration import apply_calibration
from ray_cxr.imaging.sandbox import Failure
from ray_cxr.review import pages
from ray_cxr.review.images import ImageStore, draw_failure
from ray_cxr.review.index import Query, ReviewIndex, format_query, parse_query
from ray_cxr.review.maps import MapStore, NoMapError
from ray_cxr.review.session import ReviewSession
from ray_cxr.storage.paths import file_name

STATIC: dict[str, str] = {"review.css": "text/css", "review.js": "text/javascript", "icon.svg": "image/svg+xml"}
MAX_OTHERS = 24
#: Studies after the one on the page whose images are decoded ahead.
_AHEAD = 3


@dataclass(frozen=True)
class Place:
    """Where a study is in a list; numbers of studies.

    Attributes:
        position: 1 for the first of the list, None if the study is not in it (any more).
    """

    position: int | None
    total: int
    before: tuple[int, ...]  # the nearest first
    after: tuple[int, ...]


@dataclass(frozen=True)
class FindingView:
    """A finding of an image; everything except `name` and `label` is None while the model is hidden.

    Attributes:
        p, threshold: probability and operating point on the same scale: calibrated if `is_calibrated`, else raw.
        flag: 1 or 0; None without an operating point.
        label: 1 or 0 in the table of labels; None for unknown.
    """

    name: str
    p: float | None = None
    threshold: float | None = None
    is_calibrated: bool = False
    flag: int | None = None
    label: int | None = None

    @property
    def ratio(self) -> float:
        """Return how far the probability is above the operating point, for sorting; below all others without one."""
        if self.p is None or math.isnan(self.p):
            return -2.0
        return self.p / self.threshold if self.threshold else self.p - 1.0


def build_routes(review: ReviewSession) -> list[Any]:
    """Return the routes of studies, images and static files."""
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    index = review.index
    images = ImageStore(
        lambda row: index.paths[row].as_py(), lambda row: _find_error(index, row), index.run.get("settings") or {}
    )
    maps = MapStore(index)

    def get_row(request: Request) -> int:
        row: int = request.path_params["row"]
        if not 0 <= row < len(index.ids):
            raise HTTPException(404)
        return row

    def answer(found: bytes | Failure, media_type: str) -> Response:
        if isinstance(found, Failure):
            return JSONResponse({"code": found.code, "error": found.message}, 404)
        return Response(found, media_type=media_type)

    def show_study(request: Request) -> Response:
        number, query = request.path_params["number"], parse_query(dict(request.query_params))
        if not 1 <= number <= len(index):
            raise HTTPException(404)
        rows = index.rows_of[number - 1]
        wanted = request.query_params.get("image", "")
        row = next((row for row in rows if str(row) == wanted), rows[0])
        place = find_place(review, number, query)
        near = [*place.after[:_AHEAD], *place.before[:1]]
        images.prefetch([row, *(each for each in rows if each != row), *(index.rows_of[n - 1][0] for n in near)])
        view = _build_view(review, row, maps.has_maps)
        shared = {"session": review, "index": index, "run": index.run, "model": index.model}
        html = pages.render("study.html.j2", **shared, **view, number=number, place=place, back=format_query(query))
        return HTMLResponse(html)

    def show_image(request: Request) -> Response:
        return answer(images.get_image(get_row(request)), "image/png")

    def show_thumbnail(request: Request) -> Response:
        found = images.get_thumbnail(get_row(request))
        if isinstance(found, Failure):
            # With 404, a browser shows its own symbol, and logs an error for each.
            return Response(draw_failure(found.code), media_type="image/svg+xml")
        return Response(found, media_type="image/jpeg")

    def show_heat_map(request: Request) -> Response:
        row, finding = get_row(request), request.path_params["finding"]
        if review.is_hidden(row):
            return JSONResponse({"error": "hidden until you decided on every finding of this image"}, 403)
        if finding not in index.findings:
            raise HTTPException(404)
        try:
            return Response(maps.draw(row, finding), media_type="image/png")
        except NoMapError as reason:
            return JSONResponse({"error": str(reason)})

    def show_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return Response((Path(__file__).parent / "static" / name).read_bytes(), media_type=STATIC[name])

    return [
        Route("/study/{number:int}", show_study),
        Route("/image/{row:int}", show_image),
        Route("/thumb/{row:int}", show_thumbnail),
        Route("/heatmap/{row:int}/{finding}", show_heat_map),
        Route("/static/{name}", show_file),
    ]


def describe_image(review: ReviewSession, row: int) -> dict[str, Any]:
    """Return what the page shows about the reader's verdicts on an image, see `POST /verdicts` in `app`."""
    verdicts = review.get_verdicts(row)
    hidden = review.is_hidden(row)
    return {
        "row": row,
        "number": int(review.index.study_of[row]) + 1,
        "verdicts": {
            # While the model is hidden, `agree` would reveal its flag.
            name: {
                "verdict": None if hidden and v.verdict != "unsure" else v.verdict,
                "present": v.present,
                "note": v.note,
            }
            for name, v in verdicts.items()
        },
        "decided": bool(review.decided[row]),
        "hidden": hidden,
    }


def find_place(review: ReviewSession, number: int, query: Query) -> Place:
    """Return where a study is in the list of a query.

    A study that left the list, such as by a verdict with `reviewed=no`, keeps its place between the others.
    """
    index = review.index
    order = index.select(replace(query, reviewed=""), review.reviewed, review.decided)
    kept = np.ones(len(order), dtype=bool)
    if query.reviewed:
        kept = np.isin(order, index.select(query, review.reviewed, review.decided))
    at = np.flatnonzero(order == number)
    # A study that other conditions exclude, such as another one of a patient: by number.
    start, end = (int(at[0]), int(at[0]) + 1) if len(at) else (int((order < number).sum()),) * 2
    before, after = order[:start][kept[:start]], order[end:][kept[end:]]
    return Place(
        position=len(before) + 1 if len(at) and kept[at[0]] else None,
        total=int(kept.sum()),
        before=tuple(before[: -_AHEAD - 1 : -1].tolist()),
        after=tuple(after[:_AHEAD].tolist()),
    )


def _find_error(index: ReviewIndex, row: int) -> Failure | None:
    if index.ok[row]:
        return None
    return Failure(index.categories["code"].get(row) or "unknown", index.errors[row].as_py() or "", None)


def _build_view(review: ReviewSession, row: int, has_maps: bool) -> dict[str, Any]:
    index, hidden = review.index, review.is_hidden(row)
    error = _find_error(index, row)
    rows = sorted(index.rows_of[int(index.study_of[row])], key=lambda each: index.ids[each].as_py())
    others = [other for other in index.find_patient(row) if index.study_of[other] != index.study_of[row]]
    return {
        "row": row,
        "rows": rows,
        "elsewhere": [] if hidden else _find_flags_elsewhere(review, row, rows),
        "hidden": hidden,
        "findings": [] if error else _list_findings(review, row, hidden),
        "state": describe_image(review, row),
        "error": None if error is None else (error.code, error.message),
        "quality": None if hidden else index.categories["quality"].get(row),
        "others": others[:MAX_OTHERS],
        "n_others": len(others),
        "facts": _list_facts(index, row, hidden),
        "has_maps": has_maps,
        "boxes": review.boxes.get(row, ()),
    }


def _list_findings(review: ReviewSession, row: int, hidden: bool) -> list[FindingView]:
    """Return the findings of an image: flagged ones first, then by the probability relative to the operating point."""
    index, views = review.index, []
    for name in review.findings:
        label = int(index.labels[name][row]) if name in index.labels else -1
        view = FindingView(name, label=None if label < 0 else label)
        if not hidden:
            view = replace(view, **_read_probability(index, name, row))
        views.append(view)
    return views if hidden else sorted(views, key=lambda view: (view.flag != 1, -view.ratio))


def _find_flags_elsewhere(review: ReviewSession, row: int, rows: list[int]) -> list[tuple[int, list[str]]]:
    """Return the other images of a study with a flag that an image does not have, and those findings."""
    found = []
    for other in (each for each in rows if each != row and not review.is_hidden(each)):
        flags = [(name, review.index.flags[name]) for name in review.findings if name in review.index.flags]
        if names := [name for name, values in flags if values[other] == 1 and values[row] != 1]:
            found.append((other, names))
    return found


def _read_probability(index: ReviewIndex, name: str, row: int) -> dict[str, Any]:
    flag = int(index.flags[name][row]) if name in index.flags else -1
    threshold = index.thresholds.get(name)
    p, is_calibrated = (values[row].item() for values in index.get_probability(name))
    if is_calibrated and threshold is not None:
        threshold = float(apply_calibration(index.model["calibration"][name], np.array([threshold]))[0])
    return {
        "p": None if math.isnan(p) else p,
        "threshold": threshold,
        "is_calibrated": is_calibrated,
        "flag": None if flag < 0 else flag,
    }


def _list_facts(index: ReviewIndex, row: int, hidden: bool) -> list[tuple[str, str]]:
    """Return what is known about an image and its scores, without what is unknown."""
    path, age, run = index.paths[row].as_py(), index.ages[row], index.run
    facts = {
        "image": index.ids[row].as_py(),
        "study": index.studies[row].as_py(),
        "patient": index.patients[row].as_py(),
        "age": None if np.isnan(age) else f"{age:.0f} years",
        "sex": index.categories["sex"].get(row),
        "view": index.categories["view"].get(row),
        "split": index.categories["split"].get(row),
        "file": None if path is None else file_name(path),
        "priority of the image": None if hidden or np.isnan(index.priority[row]) else f"{index.priority[row]:.3f}",
        "model": run.get("model"),
        "model digest": index.digests.get(row),
        "precision": run.get("precision"),
        "scored": run.get("finished"),
        "labels": "from a table, on request" if index.labels else None,
    }
    return [(name, str(value)) for name, value in facts.items() if value]
