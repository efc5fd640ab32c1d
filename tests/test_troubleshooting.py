"""docs/troubleshooting.md quotes what is really said: by this program, or by the Ray that is installed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
#: Where Ray keeps what the page quotes of it.
RAYS = (
    "dashboard/modules/dashboard_sdk.py",
    "exceptions.py",
    "_private/authentication/authentication_constants.py",
    "_private/authentication/http_token_authentication.py",
)
#: Stands for a name or a number, in the page and in what is read from the sources.
HOLE = "…"


def quoted() -> list[tuple[str, bool]]:
    """Each quoted line, and whether the page says that it is Ray's."""
    found = []
    for match in re.finditer(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        before = PAGE[: match.start()].rstrip().splitlines()[-1]
        found += [(line, before.startswith("Ray's line")) for line in match[1].splitlines()]
    return found


def texts(source: str) -> Iterator[str]:
    """Every text of a Python file, as a reader sees it: pieces joined, and a hole for what is filled in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w*\}", HOLE, " ".join(node.value.split()))
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            yield " ".join("".join(map(str, parts)).split())


@pytest.fixture(scope="module")
def ours() -> list[str]:
    return [text for path in (ROOT / "ray_cxr").rglob("*.py") for text in texts(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def rays() -> list[str]:
    return [text for name in RAYS for text in texts((Path(ray.__file__).parent / name).read_text(encoding="utf-8"))]


def stands_in(line: str, text: str) -> bool:
    """Whether all fragments of a quoted line stand in a text, in their order."""
    at = 0
    for fragment in filter(None, (part.strip() for part in line.split(HOLE))):
        found = text.find(fragment, at)
        if found < 0:
            return False
        at = found + len(fragment)
    return True


@pytest.mark.parametrize(("line", "of_ray"), quoted())
def test_each_quoted_line_stands_in_the_source(line: str, of_ray: bool, ours: list[str], rays: list[str]) -> None:
    assert re.search(r"\w{2,}", line.replace(HOLE, ""))
    assert any(stands_in(line, text) for text in (rays if of_ray else ours)), line


def test_what_is_not_said_is_not_found(ours: list[str]) -> None:
    assert not any(stands_in("--gpu: Ray has no GPU; buy one", text) for text in ours)
    assert not any(stands_in("connect to a cluster … Ray has no GPU", text) for text in ours)


def test_every_symptom_has_its_place() -> None:
    headings = re.findall(r"^## (.*)", PAGE, re.MULTILINE)
    for word in ("hangs", "GPU", "memory", "object store", "port", "token", "Versions", "not shared", "node was lost"):
        assert sum(word in heading for heading in headings) == 1
    assert len(quoted()) > 20


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_it_is_linked(page: str) -> None:
    assert "troubleshooting.md)" in (ROOT / page).read_text(encoding="utf-8")


def test_settings_options_and_scripts_that_it_names_are_there() -> None:
    from ray_cxr import cli

    source = Path(cli.__file__).read_text(encoding="utf-8") + (ROOT / "docs" / "settings.md").read_text()
    for name in ("--workers", "--retry-errors", "--fresh", "--resume", "batch_size", "rows_per_file", "max_pixels",
                 "max_failures", "cpus_per_actor", "object_store_mb"):  # fmt: skip
        assert name in PAGE
        assert name in source
    for path in re.findall(r"`((?:scripts|deploy)/[\w/-]+)`", PAGE):
        assert (ROOT / path.split()[0]).exists()
