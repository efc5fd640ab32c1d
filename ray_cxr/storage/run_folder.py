"""The folder that a command writes: what a later run must agree with to continue there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_cxr.errors import OutputError
from ray_cxr.storage import atomic, remote

SETTINGS = "settings.json"


def check_run(out: Path, wanted: dict[str, Any], *, remedy: str = "name another --out") -> None:
    """Check that what `out` holds, if anything, was begun with the same input and settings.

    Raises:
        OutputError: it was not; the message names each difference.
    """
    remote.check_bucket(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; name another --out")
    path = out / SETTINGS
    if not path.exists():
        return
    try:
        found = _flat(json.loads(path.read_text(encoding="utf-8")))
        wanted = _flat(wanted)
        differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    except (OSError, ValueError, TypeError, AttributeError):
        raise OutputError(f"{path}: is damaged; {remedy}") from None
    if differing:
        shown = ", ".join(f"{name} {_short(found.get(name))} (now {_short(wanted.get(name))})" for name in differing)
        raise OutputError(f"{out}: was begun with another {shown}; {remedy}")


def create_run(out: Path, wanted: dict[str, Any]) -> None:
    """Make `out` and write down what a later run must agree with.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / SETTINGS).exists():
            atomic.write_json(out / SETTINGS, wanted)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; name another --out") from None


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
