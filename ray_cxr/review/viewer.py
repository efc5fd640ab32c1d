"""The page of a study, and the files that pages load."""

from __future__ import annotations

from typing import Any

from ray_cxr.review import pages
from ray_cxr.review.session import ReviewSession


def build_routes(review: ReviewSession) -> list[Any]:
    """Return the routes of studies, images and static files."""
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    def show_study(request: Request) -> Response:
        number = request.path_params["number"]
        if not 1 <= number <= len(review.index):
            raise HTTPException(404)
        rows = review.index.rows_of[number - 1]
        context: dict[str, Any] = {"session": review, "index": review.index, "run": review.index.run}
        context |= {"model": review.index.model, "back": "", "number": number, "rows": rows}
        return HTMLResponse(pages.render("study.html.j2", **context))

    return [Route("/study/{number:int}", show_study)]
