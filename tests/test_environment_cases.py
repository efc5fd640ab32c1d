"""The program `tests/environments.py`: cases that this machine cannot run are not counted as passed."""

from __future__ import annotations

from pathlib import Path

import environments
import pytest

MISSING = "no-such-program"
#: Fail with a message, as `unshare` does.
FAILS = "echo 'unshare: unshare failed: {}' >&2; exit 1"


@pytest.mark.parametrize(
    ("start", "line"),
    [
        (["sh", "-c", "exit 0"], "ok one "),
        ([MISSING], "skipped one: no-such-program is not installed"),
        (["prlimit", "--nproc=100", MISSING], "skipped one: prlimit: failed to execute no-such-program: "),
        (
            ["sh", "-c", FAILS.format("Operation not permitted")],
            "skipped one: unshare: unshare failed: Operation not permitted",
        ),
        (["sh", "-c", FAILS.format("Invalid argument")], "FAILED one: unshare: unshare failed: Invalid argument"),
        (["sh", "-c", "exit 3"], "FAILED one: exit code 3"),
    ],
)
def test_cases_that_cannot_run_are_skipped(
    start: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(_: Path) -> None:
        environments.require(start)

    monkeypatch.setattr(environments, "CASES", {"one": one})
    monkeypatch.setattr(environments, "inputs", None, raising=False)
    code = environments.main([])
    case, numbers = capsys.readouterr().out.splitlines()
    assert case.startswith(line)
    outcome = line.split()[0].lower()
    assert numbers == ", ".join(f"{int(name == outcome)} {name}" for name in ("ok", "skipped", "failed"))
    assert code == (outcome == "failed")


@pytest.mark.parametrize("name", ["half_a_cpu", "no_network_interface", "only_the_loopback_interface"])
def test_cases_need_unshare(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.shutil, "which", lambda _: None)
    with pytest.raises(environments.Skipped, match=r"^(unshare is not installed|no control group limits the CPUs)$"):
        environments.CASES[name](tmp_path)


def test_the_limit_of_processes_needs_prlimit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.shutil, "which", lambda _: None)
    with pytest.raises(environments.Skipped, match=r"^prlimit is not installed$"):
        environments.as_another_user(100)
