"""The pages of `ray-cxr review`: routes, and what each template gets.

Every route needs the session's cookie, see `guard`. Numbers of studies and rows are integers; findings are names of the
model's findings. No text of a request names a file.

    GET  /?token=T            sets the cookie and redirects (303) to /; a token works once
    GET  /                    list.html.j2; query parameters: see `index.Query`
    GET  /study/{number}      study.html.j2, see `viewer`
    GET  /image/{row}         the decoded image, see `viewer`; also /thumb/{row}, /heatmap/{row}/{finding}
    GET  /static/{name}       a file of `viewer.STATIC`
    POST /verdicts            {"row": 17, "finding": "Mass" | null, "verdict": "agree" | "disagree" | "unsure",
                               or "present": 1 | 0, "note": "...", "heatmap": false, "labels": false}
                              finding null: all findings of the image without a verdict, such as `present: 0` for the
                              rest. A finding without a flag, and an image whose model output is hidden, take `present`
                              or `unsure`. `heatmap`, `labels`: they were visible at that moment.
                              Answer 200: {"row", "number", "verdicts": {finding: {"verdict", "present", "note"}} of the
                              whole image, "decided": every finding has one, "hidden": the model is still hidden}
                              Answer 400: {"error": "..."} wrong request; 507: {"error"} the verdict was not recorded
    POST /undo                {}: takes back the last decision of this session; the answer is that of /verdicts for the
                              image, or 409 {"error"} if there is nothing to undo

Every template gets `session` (`ReviewSession`), `index` (`ReviewIndex`), `run` (run.json), `model` (model.json), `back`
(query string of the list to return to, "" or "?..."). base.html.j2 has the blocks `title` and `main`.

    list.html.j2    `query` (`Query`), `studies` (list of `StudyLine`), `total` (studies that match), `pages`, `page`,
                    `progress` (of all studies, by this reader: `reviewed` and `partly`),
                    `choices` (values of each filter by name), `link(name=value, ...)` (the list's address with other
                    parameters)
    study.html.j2   `number`, `rows` (rows of the study), and what `viewer` adds
    refused.html.j2 `status`, `text`; nothing else, because the browser has no session

The content security policy admits no inline script, no inline style and no `style` attribute; scripts may set
`element.style`. Colours and lengths that depend on values go into SVG attributes, `<meter>` or `<progress>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.errors import InputError, OutputError
from ray_cxr.review import pages, viewer
from ray_cxr.review.guard import Guard, Session
from ray_cxr.review.index import PAGE_SIZE, Query, ReviewIndex, format_query, parse_query
from ray_cxr.review.session import Decision, ReviewSession


@dataclass(frozen=True)
class StudyLine:
    """A line of the list.

    Attributes:
        row: the image that opens, see `ReviewIndex.rows_of`.
        priority, top_finding: of the study, as in worklist.csv.
        hidden: the model's output is hidden; `priority`, `top_finding`, `flagged` and `quality` are then empty.
        probability: of the query's finding, the highest of the study; calibrated where the pages show that.
        reviewed: `yes`, `partly` or `no`.
    """

    number: int
    row: int
    image_id: str
    study_id: str | None
    patient_id: str | None
    n_images: int
    codes: tuple[str, ...]
    hidden: bool
    priority: float | None
    top_finding: str | None
    flagged: tuple[str, ...]
    quality: tuple[str, ...]
    probability: float | None
    reviewed: str


def build_app(review: ReviewSession, login: Session) -> Any:
    """Return the ASGI application of a reader's session."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    def show_list(request: Request) -> Response:
        return HTMLResponse(_render_list(review, dict(request.query_params)))

    async def record(request: Request) -> Response:
        def decide(body: Any) -> int:
            decision = Decision.parse(body, review.index, review.findings)
            review.decide(decision)
            return decision.row

        return await _answer(request, decide)

    async def undo(request: Request) -> Response:
        def take_back(body: Any) -> int | None:
            undone = review.undo()
            return undone[0][0] if undone else None

        return await _answer(request, take_back)

    async def _answer(request: Request, change: Callable[[Any], int | None]) -> Response:
        from starlette.concurrency import run_in_threadpool

        try:
            row = await run_in_threadpool(change, json.loads(await request.body() or b"{}"))
        except OutputError as error:
            return JSONResponse({"error": str(error)}, 507)
        except (InputError, ValueError, RecursionError) as error:
            text = str(error) if isinstance(error, InputError) else "the body is not JSON"
            return JSONResponse({"error": text}, 400)
        if row is None:
            return JSONResponse({"error": "nothing to undo in this session"}, 409)
        return JSONResponse(viewer.describe_image(review, row))

    routes = [
        Route("/", show_list),
        Route("/verdicts", record, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
        *viewer.build_routes(review),
    ]

    def not_found(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        text = {404: "Not found.", 405: "Method not allowed."}.get(status, "The server failed; see its terminal.")
        return HTMLResponse(refuse(status, text), status)

    handlers: Any = {404: not_found, 405: not_found, 500: not_found}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), login, refuse)


def refuse(status: int, text: str) -> str:
    """Return the page of a request that was refused."""
    return pages.render("refused.html.j2", status=status, text=text)


def _render_list(review: ReviewSession, values: dict[str, str]) -> str:
    index, query = review.index, parse_query(values)
    numbers = index.select(query, review.reviewed, review.decided)
    n_pages = max(1, -(-len(numbers) // PAGE_SIZE))
    page = min(query.page, n_pages)
    shown = numbers[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
    return pages.render(
        "list.html.j2",
        session=review,
        index=index,
        run=index.run,
        model=index.model,
        query=query,
        back=format_query(query, page=page),
        studies=[_build_line(review, int(number), query.finding) for number in shown],
        total=len(numbers),
        progress=_count_reviewed(review),
        pages=n_pages,
        page=page,
        choices=_list_choices(review),
        link=lambda **changes: "/" + format_query(query, **{"page": 1, **changes}),
    )


def _count_reviewed(review: ReviewSession) -> dict[str, int]:
    states = {"reviewed": "yes", "partly": "partly"}
    return {
        name: len(review.index.select(Query(reviewed=state), review.reviewed, review.decided))
        for name, state in states.items()
    }


def _list_choices(review: ReviewSession) -> dict[str, tuple[str, ...]]:
    """Return the values of each filter; filters on hidden columns have none."""
    index = review.index
    choices = {name: index.categories[name].names for name in ("code", "split", "sex", "view")}
    hidden = {} if review.is_blind else {"quality": index.categories["quality"].names, "flag": ("yes", "no")}
    return {**choices, **hidden, "finding": review.findings, "reviewed": ("no", "partly", "yes")}


def _build_line(review: ReviewSession, number: int, finding: str) -> StudyLine:
    index = review.index
    rows = index.rows_of[number - 1]
    row = rows[0]
    hidden = any(review.is_hidden(row) for row in rows)
    flagged = [name for name in review.findings if name in index.flags and (index.flags[name][rows] == 1).any()]
    priority = index.study_priority[number - 1]
    p = index.get_probability(finding)[0] if finding in index.p else None
    highest = None if p is None or np.isnan(p[rows]).all() else float(np.nanmax(p[rows]))
    n_open = int((index.ok[rows] & ~review.decided[rows]).sum())
    some = bool(review.reviewed[rows].any())
    return StudyLine(
        number=number,
        row=row,
        image_id=index.ids[row].as_py(),
        study_id=index.studies[row].as_py(),
        patient_id=index.patients[row].as_py(),
        n_images=len(rows),
        codes=_list_values(index, "code", rows),
        hidden=hidden,
        priority=None if hidden or np.isnan(priority) else float(priority),
        top_finding=None if hidden else index.study_top.get(number - 1),
        flagged=() if hidden else tuple(flagged),
        quality=() if hidden else _list_values(index, "quality", rows),
        probability=None if hidden else highest,
        reviewed="no" if not some else "partly" if n_open else "yes",
    )


def _list_values(index: ReviewIndex, name: str, rows: list[int]) -> tuple[str, ...]:
    found = (index.categories[name].get(row) for row in rows)
    return tuple(sorted({value for value in found if value is not None}))
