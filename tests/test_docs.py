"""Check that the docs match the program: settings, messages and links; and that lock files are hashed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])


def test_settings_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/settings-doc"], capture_output=True, encoding="utf-8", check=True, cwd=ROOT
    )
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == done.stdout


def read_texts(path: Path) -> Iterator[str]:
    """Yield all strings of a Python file, with `…` for each inserted value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w*\}", "…", " ".join(node.value.split()))
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield " ".join("".join(map(str, parts)).split())


def test_messages_that_troubleshooting_quotes_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    texts = "\n".join(text for path in (ROOT / "ray_cxr").rglob("*.py") for text in read_texts(path))
    blocks = re.findall(r"^([^\n]*)\n+```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for before, block in blocks if not before.startswith("Ray's line") for line in block.splitlines()]
    assert len(lines) > 15
    for line in [*lines, "--gpu: Ray has no GPU; buy one"]:
        fragments = [re.escape(part.strip()) for part in line.split("…") if part.strip()]
        assert bool(re.search(".*".join(fragments), texts)) == (line in lines), line


def list_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_have_targets() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                name, _, anchor = link.partition("#")
                target = page.parent / name if name else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in list_anchors(target), f"{page.name}: {link}"


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in ROOT.glob("docs/*.md") if f"({page.name}" not in index] == ["README.md"]


def test_lock_files_are_hashed_and_include_the_runtime_lock() -> None:
    pins = {}
    for kind in ("", "-dev", "-gpu"):
        text = (ROOT / f"requirements{kind}.lock").read_text(encoding="utf-8")
        blocks = re.split(r"^(?=[a-z0-9][\w.\-]*==)", text, flags=re.MULTILINE)[1:]
        assert all("--hash=sha256:" in block for block in blocks)
        assert "://" not in text
        pins[kind] = {block.split()[0] for block in blocks}
        assert len(pins[kind]) > 50
    assert pins[""] <= pins["-dev"] & pins["-gpu"]
