"""Help, suggestions and names of the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_cxr import cli, config

Command = Callable[..., tuple[int, str, str]]

PARSER = cli._build_parser()
PARSERS = PARSER.commands.choices
#: Sections of the settings that each command reads, its own first.
SECTIONS = {
    "prepare": ("prepare", "ray"),
    "train": ("train", "ray"),
    "tune": ("tune", "train", "ray"),
    "score": ("score", "ray"),
    "quantize": ("quantize",),
    "recalibrate": ("recalibrate",),
    "export-sr": ("pacs",),
}


def list_keys(section: str) -> list[str]:
    return list(config.Config().model_dump()[section])


def test_every_argument_has_a_help_text() -> None:
    for name, parser in PARSERS.items():
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"


@pytest.mark.parametrize("name", PARSERS)
def test_help_of_a_command_fits_and_has_examples_that_parse(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    examples = [line.strip() for line in lines if line.startswith(f"  ray-cxr {name} ")]
    assert len(set(examples)) == 2
    for example in examples:
        cli._build_parser().parse_args(shlex.split(example.partition(" > ")[0])[1:])
    assert all(len(line) <= 60 for line in lines if line.strip() not in examples)
    monkeypatch.setenv("COLUMNS", "200")
    assert len(command(name, "--help")[1].splitlines()) <= len(lines)
    for key in list_keys(SECTIONS[name][0]) if name in SECTIONS else ():
        assert key in out


def test_overview_names_every_command_once(command: Command) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert command("--help") == command("help") == (0, out, "")
    assert command("help", "train") == command("train", "--help")
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert sorted(named) == sorted(PARSERS)


#: A command line, and what its one line must suggest.
MEANT = [
    ("trian p", "'train'"),
    ("--verison", "--version"),
    ("import w.h5", "'import-weights'"),
    ("evaluate s", "'report'"),
    ("report s --out r --heatmaps 3", "which score and export-sr have"),
    ("score b images --out s", "'images'; pass it after --manifest, --images or --prepared"),
    ("score b --out s", "--images"),
    ("train p --out r --set backbone=Tinycnn", "'TinyCNN'"),
    ("score --modle b", "--bundle"),
    ("report s --label m", "did you mean --manifest?"),
    ("score --image i", "--images"),
    ("train p --work 2", "--workers"),
    ("prepare m --out p --sizes 224", "--size"),
    ("manifest t --out m --split patients", "'patient'"),
    ("score b --images i --out s --precision bf61", "'bf16'"),
    ("train --epochs 3", "use --set epochs=3"),
    ("train p --out r --batch-size=16", "use --set batch_size=16"),
    ("train p --out r --epoch 3", "did you mean --set epochs=3?"),
    ("train p --out r --num_cpus 2", "use --set ray.num_cpus=2"),
    ("train p --out r --dense [64,32]", "use --set dense='[64,32]'"),
    ("tune p --epochs 3", "use --set train.epochs=3"),
    ("train p --out r --set epoch=3", "'epochs'"),
    ("train p --out r --set trian.epochs=3", "'train'"),
    ("train p --out r --set backbone=Densenet121", "'DenseNet121'"),
]


@pytest.mark.parametrize(("line", "part"), MEANT)
def test_misspelt_word_is_answered_with_the_right_one(line: str, part: str, command: Command) -> None:
    code, out, err = command(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err


@pytest.mark.parametrize("name", SECTIONS)
def test_setting_that_is_passed_as_an_option_is_answered_with_set(name: str, command: Command) -> None:
    options = {text for action in PARSERS[name]._actions for text in action.option_strings}
    seen = {"sizes"}  # nearer to --size
    for section in SECTIONS[name]:
        for key in list_keys(section):
            option = f"--{key.replace('_', '-')}"
            if option not in options and key not in seen:
                prefix = "" if section == SECTIONS[name][0] else f"{section}."
                assert f"use --set {prefix}{key}=1\n" in command(name, option, "1")[2]
            seen.add(key)


def parse(line: str) -> argparse.Namespace:
    return cli._build_parser().parse_args(line.split())


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["score b --images i --out o", "score --out o --images i --bundle b", "score --model=b --images i --out o"],
         {"model": "b"}),
        (["quantize b p --out o", "quantize p --bundle b --out o"], {"bundle": "b", "prepared": "p"}),
        (["recalibrate b s --labels m --out o", "recalibrate --bundle b s --manifest m --out o"],
         {"bundle": "b", "scores": "s", "labels": "m"}),
        (["export-onnx b --out o", "export-onnx --out o --bundle b"], {"bundle": "b"}),
        (["ensemble a b --out o", "ensemble --bundle a b --out o"], {"bundles": ["a", "b"]}),
        (["prepare m --out o", "prepare --manifest m --out o"], {"manifest": "m"}),
        (["report s --labels m --out o", "report s --out o --manifest m"], {"scores": ["s"], "labels": "m"}),
        (["train p --out o --set seed=3", "train p --out o --seed 3"], {"overrides": ["seed=3"]}),
        (["tune p --out o --set seed=3", "tune p --out o --seed 3"], {"overrides": ["seed=3"]}),
        (["quantize b p --out o --set seed=3", "quantize b p --out o --seed 3"], {"overrides": ["seed=3"]}),
    ],
)  # fmt: skip
def test_spellings_of_one_input_mean_the_same(lines: list[str], names: dict[str, object], command: Command) -> None:
    for line in lines:
        found = parse(line)
        assert {name: getattr(found, name) for name in names} == names, line


@pytest.mark.parametrize(
    "line",
    [
        "report s --labels m --manifest n --out o",
        "report s --manifest=m --manifest n --out o",
        "score --model b --bundle c --images i --out o",
        "ensemble --bundle a --bundle b --out o",
    ],
)
def test_input_that_is_passed_twice_is_refused(line: str, command: Command) -> None:
    code, _, err = command(*line.split())
    assert (code, err.count("\n")) == (2, 1)
    assert "passed 2 times" in err


def test_input_that_is_passed_by_place_and_by_name_is_refused(command: Command) -> None:
    code, _, err = command("score", "b", "--model", "c", "--images", "i", "--out", "o")
    assert (code, err.count("\n")) == (2, 1)
    assert "'b'" in err


def complete_in_bash(script: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    line = f"""
        source {shlex.quote(str(script))}
        compopt() {{ :; }}
        COMP_WORDS=({shlex.join(["ray-cxr", *words])}) COMP_CWORD={len(words)}
        "$(complete -p ray-cxr | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", line], cwd=script.parent, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes_commands_options_choices_and_files(tmp_path: Path, command: Command) -> None:
    code, out, err = command("completion", "bash")
    assert (code, err) == (0, "")
    script = tmp_path / "ray-cxr.sh"
    script.write_text(out)
    (tmp_path / "m.parquet").touch()
    assert complete_in_bash(script, "pre") == ["prepare"]
    assert sorted(complete_in_bash(script, "")) == sorted(PARSERS)
    assert complete_in_bash(script, "score", "--heat") == ["--heatmaps"]
    assert complete_in_bash(script, "manifest", "t.csv", "--split", "") == ["official", "patient"]
    for words in (["prepare", ""], ["score", "b", "--manifest", "m"], ["manifest", "t.csv", "--images", "m"]):
        assert "m.parquet" in complete_in_bash(script, *words), words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_script(shell: str, tmp_path: Path, command: Command) -> None:
    code, out, err = command("completion", shell)
    assert (code, err) == (0, "")
    assert all(name in out for name in PARSERS)
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(out)
    done = subprocess.run(
        [shell, "-n", tmp_path / "script"], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
