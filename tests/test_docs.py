"""The documents agree with the program: settings, commands and links; lock files are hashed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])


def test_settings_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/settings-doc"], capture_output=True, encoding="utf-8", check=True, cwd=ROOT
    )
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == done.stdout
    assert "| None |" not in done.stdout
    assert "|  |" not in done.stdout


def test_links_have_targets() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_is_in_the_help_and_has_a_page(command: Callable[..., tuple[int, str, str]]) -> None:
    code, text, _ = command("--help")
    assert code == 0
    pages = {"train": "training", "tune": "tuning", "score": "scoring", "quantize": "scoring"}
    for name in ("manifest", "prepare", "train", "tune", "score", "quantize", "report", "recalibrate", "export-sr"):
        assert (ROOT / f"docs/{pages.get(name, name)}.md").exists()
        assert name in text
    assert "import-weights" in text
    assert "demo" in text


def test_lock_files_are_hashed_and_include_the_runtime_lock() -> None:
    pins = {}
    for kind in ("", "-dev", "-gpu"):
        text = (ROOT / f"requirements{kind}.lock").read_text(encoding="utf-8")
        blocks = re.split(r"^(?=[a-z0-9][\w.\-]*==)", text, flags=re.MULTILINE)[1:]
        assert all("--hash=sha256:" in block for block in blocks)
        assert "://" not in text
        assert "--index-url" not in text
        pins[kind] = {block.split()[0] for block in blocks}
        assert len(pins[kind]) > 50
    assert pins[""] <= pins["-dev"] & pins["-gpu"]
