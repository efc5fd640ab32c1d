"""A browser that reads the pages of `review`, without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np

from ray_cxr.review.app import build_app
from ray_cxr.review.guard import Session
from ray_cxr.review.session import ReviewSession

ORIGIN = "http://127.0.0.1:8000"


class Browser:
    """A browser of one reader's session, which keeps its cookies."""

    def __init__(self, review: ReviewSession) -> None:
        self.review, self.login = review, Session()
        self.cookies: dict[str, str] = {}
        self._app = build_app(review, self.login)

    def log_in(self) -> Browser:
        assert self.get(f"/?token={self.login.token}").status_code == 303
        return self

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
                return await client.request(method, path, **options)

        kept = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        options["headers"] = {"Cookie": kept, **options.get("headers", {})}
        answer = asyncio.run(send())
        if (found := answer.headers.get("set-cookie")) is not None:
            name, _, value = found.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.request("GET", path, headers=headers)

    def send(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Send JSON as the page does."""
        return self.request("POST", path, json=body, headers={"Origin": ORIGIN, **headers})

    def decide(self, row: int, **values: Any) -> dict[str, Any]:
        answer = self.send("/verdicts", {"row": row, **values})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


def find_rows(review: ReviewSession, finding: str, flag: int) -> list[int]:
    """Return the rows whose flag of a finding is 1, 0 or -1 (null)."""
    return [int(row) for row in np.flatnonzero(review.index.flags[finding] == flag)]
