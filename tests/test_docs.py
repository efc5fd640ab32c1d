"""The documents: every setting stands in them, every link leads somewhere, nothing of one machine is in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])


def test_settings_page_is_what_the_settings_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/settings-doc"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == done.stdout
    assert "| None |" not in done.stdout
    assert "|  |" not in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_has_its_page_and_stands_in_the_help() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "ray_cxr.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in ("manifest", "prepare", "train", "tune", "score", "quantize", "report", "recalibrate", "export-sr"):
        page = {"train": "training", "tune": "tuning", "score": "scoring", "quantize": "scoring"}.get(name, name)
        assert (ROOT / f"docs/{page}.md").exists()
        assert name in helped
    for name in ("import-weights", "demo"):
        assert name in helped


def test_lock_files_are_hashed_and_name_no_address() -> None:
    for name in ("requirements.lock", "requirements-dev.lock", "requirements-gpu.lock"):
        text = (ROOT / name).read_text(encoding="utf-8")
        packages = re.findall(r"^[a-z0-9][\w.\-]*==", text, re.MULTILINE)
        blocks = re.split(r"^(?=[a-z0-9][\w.\-]*==)", text, flags=re.MULTILINE)[1:]
        assert len(packages) > 50
        assert all("--hash=sha256:" in block for block in blocks)
        assert "://" not in text
        assert "--index-url" not in text


def test_run_lock_is_part_of_the_others() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9][\w.\-]*==\S+)", (ROOT / name).read_text(), re.MULTILINE))

    assert pins("requirements.lock") <= pins("requirements-dev.lock")
    assert pins("requirements.lock") <= pins("requirements-gpu.lock")
