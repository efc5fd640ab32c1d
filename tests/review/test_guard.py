"""Who may read the pages, and what their answers forbid a browser."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from review_browser import ORIGIN, Browser
from score_archive import Archive

from ray_cxr.review import guard
from ray_cxr.review.server import open_review

PATHS = ["/", "/study/1", "/image/0", "/thumb/0", "/heatmap/0/Effusion", "/static/review.css", "/nothing"]


@pytest.fixture
def stranger(archive: Archive) -> Browser:
    """Return a browser without a session."""
    return Browser(open_review(archive.root / "SCORES", "anna"))


@pytest.mark.parametrize("path", PATHS)
def test_page_without_the_cookie_is_refused(path: str, stranger: Browser) -> None:
    for headers in ({}, {"Cookie": f"{stranger.login.cookie_name}=wrong"}, {"Cookie": "other=1; a=\x7f"}):
        answer = stranger.get(path, **headers)
        assert answer.status_code == 401
        assert "00000" not in answer.text
    assert stranger.send("/verdicts", {"row": 0, "finding": "Effusion", "present": 1}).status_code == 401
    assert not stranger.review.path.exists()


def test_token_works_once_and_leaves_the_address(stranger: Browser) -> None:
    token = stranger.login.token
    assert stranger.get("/?token=wrong").status_code == 401
    answer = stranger.get(f"/?token={token}")
    assert (answer.status_code, answer.headers["location"], answer.text) == (303, "/", "")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    assert token not in cookie
    assert stranger.get("/").status_code == 200
    stranger.cookies.clear()
    assert stranger.get(f"/?token={token}").status_code == 401
    # The terminal shows a new token, for a second browser.
    assert stranger.login.token != token
    assert stranger.log_in().get("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "0.0.0.0", ""]
)
def test_foreign_name_of_this_machine_is_refused(host: str, open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    answer = browser.get("/", Host=host)
    assert answer.status_code == 421
    assert "00000" not in answer.text
    assert browser.get(f"/?token={browser.login.token}", Host=host).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:9123", "LOCALHOST", "[::1]:8000"])
def test_tunnel_to_another_port_is_served(host: str, open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    [(name, value)] = browser.cookies.items()
    assert browser.get("/", Host=host, Cookie=f"{name}={value}").status_code == 200


#: Headers of requests that another site, or another port of this machine, causes.
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:9999", "Sec-Fetch-Site": "same-site"},
    {"Origin": "null"},
    {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
    {},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_verdict_from_another_site_is_refused(headers: dict[str, str], open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    body = {"row": 0, "finding": "Effusion", "present": 1}
    for path in ("/verdicts", "/undo"):
        assert browser.request("POST", path, json=body, headers=headers).status_code == 403
    assert browser.send("/verdicts", body, **{"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_form_of_another_type_cannot_send_a_verdict(open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    text = '{"row": 0, "finding": "Effusion", "present": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = browser.request("POST", "/verdicts", content=text, headers={"Origin": ORIGIN, "Content-Type": kind})
        assert answer.status_code == 415
    assert browser.request("PUT", "/verdicts", headers={"Origin": ORIGIN}).status_code == 405
    assert not browser.review.path.exists()


@pytest.mark.parametrize("path", PATHS[:6])
def test_page_that_another_site_loads_is_refused(path: str, open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    for site in ("cross-site", "same-site"):
        assert browser.get(path, **{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}).status_code == 403


def test_every_answer_forbids_scripts_frames_referrers_and_caches(open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    answers = [browser.get(path) for path in PATHS]
    answers.append(browser.send("/verdicts", {"row": 0, "finding": "Effusion", "present": 1}))
    answers.append(browser.get("/", Host="evil.example"))
    answers.append(browser.get(f"/?token={browser.login.token}"))
    for answer in answers:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        sources = {source for value in policy.values() for source in value.split()}
        assert sources <= {"'none'", "'self'", "blob:"}
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_large_body_is_refused(open_page: Callable[..., Browser]) -> None:
    browser = open_page()
    body = {"row": 0, "finding": "Effusion", "present": 1, "note": "x" * guard.MAX_BODY}
    assert browser.send("/verdicts", body).status_code == 413

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(guard.MAX_BODY // 1000 + 1):
            yield b" " * 1000

    headers = {"Origin": ORIGIN, "Content-Type": "application/json"}
    assert browser.request("POST", "/verdicts", content=stream(), headers=headers).status_code == 413
    assert not browser.review.path.exists()


@pytest.mark.parametrize("path", ["/study/../../etc/passwd", "/image/..%2f..%2fetc%2fpasswd", "/static/../app.py"])
def test_path_in_an_address_opens_no_file(path: str, open_page: Callable[..., Browser]) -> None:
    assert open_page().get(path).status_code in (400, 404)


@pytest.mark.parametrize("number", ["0", "-1", "25", "999999999999999999999999", "1.0", "x", "1%00"])
def test_number_without_a_study_is_not_found(number: str, open_page: Callable[..., Browser]) -> None:
    assert open_page().get(f"/study/{number}").status_code == 404
