"""docs/troubleshooting.md quotes messages that exist: in this program, or in the installed Ray."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
#: Where Ray has the messages that the page quotes.
RAY_FILES = (
    "dashboard/modules/dashboard_sdk.py",
    "exceptions.py",
    "_private/authentication/authentication_constants.py",
    "_private/authentication/http_token_authentication.py",
)
#: Stands for a name or a number, in the page and in what is read from the sources.
HOLE = "…"


def quoted_lines() -> list[tuple[str, bool]]:
    """Each quoted line, and whether the page says that it is Ray's."""
    found = []
    for match in re.finditer(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        before = PAGE[: match.start()].rstrip().splitlines()[-1]
        found += [(line, before.startswith("Ray's line")) for line in match[1].splitlines()]
    return found


def read_texts(path: Path) -> Iterator[str]:
    """All strings of a Python file, with a hole for each value that is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w*\}", HOLE, " ".join(node.value.split()))
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            yield " ".join("".join(map(str, parts)).split())


def is_in(line: str, text: str) -> bool:
    """Whether all fragments of a quoted line are in a text, in their order."""
    at = 0
    for fragment in filter(None, (part.strip() for part in line.split(HOLE))):
        found = text.find(fragment, at)
        if found < 0:
            return False
        at = found + len(fragment)
    return True


def test_every_quoted_message_exists() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    ray = Path(spec.origin).parent
    ours = [text for path in (ROOT / "ray_cxr").rglob("*.py") for text in read_texts(path)]
    rays = [text for name in RAY_FILES for text in read_texts(ray / name)]
    lines = quoted_lines()
    assert len(lines) > 20
    for line, of_ray in lines:
        assert re.search(r"\w{2,}", line.replace(HOLE, ""))
        assert any(is_in(line, text) for text in (rays if of_ray else ours)), line
    # The comparison can fail: neither another message nor fragments in another order are found.
    assert not any(is_in("--gpu: Ray has no GPU; buy one", text) for text in ours)
    assert not any(is_in("connect to a cluster … Ray has no GPU", text) for text in ours)


def test_named_options_settings_and_scripts_exist() -> None:
    sources = (ROOT / "ray_cxr" / "cli.py", ROOT / "docs" / "settings.md")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    settings = ("batch_size", "rows_per_file", "max_pixels", "max_failures", "cpus_per_actor", "object_store_mb")
    for name in ("--workers", "--retry-errors", "--fresh", "--resume", *settings):
        assert name in PAGE
        assert name in text
    for path in re.findall(r"`((?:scripts|deploy)/[\w/-]+)`", PAGE):
        assert (ROOT / path).exists()
