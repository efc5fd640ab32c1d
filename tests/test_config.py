"""Settings: frozen, ranged, and refused with one line that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_cxr import config
from ray_cxr.errors import ConfigError


def refusal(*overrides: str, path: str | Path | None = None, section: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides, section=section)
    text = str(caught.value)
    assert text.splitlines() == [text]
    return text


def toml(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    settings = config.load(None)
    assert settings == config.Config()
    assert settings.train.backbone == "DenseNet121"
    assert settings.train.flip is False
    assert settings.prepare.sizes == (224,)
    assert settings.score.max_error_rate == 0.5
    assert settings.train.finding_names()[0] == "Atelectasis"
    assert config.InputSpec() == config.InputSpec(size=224, aspect="stretch", interpolation="area")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epoch=3", "--set epoch=3: unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("rya.num_cpus=3", "--set rya.num_cpus=3: unknown key 'rya'; did you mean 'ray'?"),
        ("ray.num_cpu=3", "--set ray.num_cpu=3: unknown key 'ray.num_cpu'; did you mean 'num_cpus'?"),
        ("zzzzzz=3", "--set zzzzzz=3: unknown key 'train.zzzzzz'"),
        ("train.=1", "--set train.=1: unknown key 'train.'"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(override: str, expected: str) -> None:
    assert refusal(override) == expected


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("epochs=0", "train.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("epochs=2.5", "train.epochs: "),
        ("epochs=1e999", "train.epochs: Input should be a finite number"),
        ("epochs=" + "9" * 5000, "train.epochs: "),
        ("seed=0x" + "f" * 5000, "train.seed: "),
        ("seed=-1", "train.seed: "),
        ("seed=2147483648", "train.seed: "),
        ("dropout=1.0", "train.dropout: Input should be less than 1 (got 1.0)"),
        ("dropout=nan", "train.dropout: "),
        ("learning_rate=0", "train.learning_rate: Input should be greater than 0 (got 0)"),
        ("learning_rate=nan", "train.learning_rate: "),
        ("warmup_epochs=inf", "train.warmup_epochs: Input should be a finite number (got inf)"),
        ("backbone=ResNet51", "train.backbone: Input should be 'ResNet50', "),
        ("batch_size=1979-05-27", "train.batch_size: "),
        ("flip=maybe", "train.flip: "),
        ("dense=[0]", "train.dense.0: "),
        ("dense=" + "[" * 3000, "train.dense: "),
        ("findings=13", "train.findings: 13 is neither 14, 15 nor a list of names"),
        ("findings=null", "train.findings: None is neither 14, 15 nor a list of names"),
        ("findings=1.5", "train.findings: 1.5 is neither"),
        ("findings=", "train.findings: the list is empty"),
        ("findings=[1, 2]", "train.findings: unknown finding 1"),
        ("findings=Mass,Nodul", "train.findings: unknown finding 'Nodul'; did you mean 'Nodule'?"),
        ("findings=²", "train.findings: unknown finding '²'"),
        ("prepare.sizes=[]", "prepare.sizes: name at least one size"),
        ("prepare.sizes=[31]", "Input should be greater than or equal to 32 (got 31)"),
        ("prepare.sizes=[2049]", "Input should be less than or equal to 2048 (got 2049)"),
        ("score.max_error_rate=1.01", "score.max_error_rate: Input should be less than or equal to 1 (got 1.01)"),
        ("score.max_error_rate=nan", "score.max_error_rate: "),
        ("ray.num_cpus=0", "ray.num_cpus: "),
        ("ray.object_store_mb=79", "ray.object_store_mb: "),
    ],
)
def test_value_out_of_range_is_refused_with_place_value_and_rule(override: str, part: str) -> None:
    text = refusal(override)
    assert text.startswith("--set ")
    assert part in text


@pytest.mark.parametrize("override", ["epochs", "=3", "", " = 3"])
def test_override_that_is_no_pair(override: str) -> None:
    assert refusal(override) == " ".join(f"--set {override}: write it as key=value".split())


def test_line_breaks_in_an_override_stay_out_of_the_message() -> None:
    refusal("a\nb=3")
    refusal("epochs='''x\ny'''")
    refusal("epochs\r\n")


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("ray.num_cpus=2", "ray", "num_cpus", 2),
        ("epochs=3", "train", "epochs", 3),
        ("train.epochs=3", "train", "epochs", 3),
        (" epochs = 3 ", "train", "epochs", 3),
        ("dense=[256, 128]", "train", "dense", (256, 128)),
        ("dense=[]", "train", "dense", ()),
        ("weights=none", "train", "weights", "none"),
        ('weights="none"', "train", "weights", "none"),
        ("weights=runs/a=b.h5", "train", "weights", "runs/a=b.h5"),
        ("flip=true", "train", "flip", True),
        ("size=null", "train", "size", None),
        ("patience=None", "train", "patience", None),
        ("learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("findings=15", "train", "findings", 15),
        ("findings=Mass,Nodule", "train", "findings", ("Mass", "Nodule")),
        ("findings=['Mass']", "train", "findings", ("Mass",)),
        ("prepare.sizes=[320, 224, 320]", "prepare", "sizes", (224, 320)),
        ("ray.address=auto", "ray", "address", "auto"),
        ("ray.address=ray://head:10001", "ray", "address", "ray://head:10001"),
    ],
)
def test_overrides(override: str, section: str, field: str, value: Any) -> None:
    found = getattr(getattr(config.load(None, [override]), section), field)
    assert found == value
    assert type(found) is type(value)


def test_later_override_wins_and_the_section_is_the_commands_own() -> None:
    assert config.load(None, ["epochs=3", "epochs=4"]).train.epochs == 4
    assert config.load(None, ["batch_size=4"], section="score").score.batch_size == 4
    assert refusal("epochs=4", section="score") == "--set epochs=4: unknown key 'score.epochs'"


def test_file_and_override(tmp_path: Path) -> None:
    path = toml(tmp_path, '[train]\nepochs = 7\nfindings = ["Mass", "Hernia"]\n[ray]\nnum_cpus = 2\n')
    loaded = config.load(path, ["train.epochs=8", "ray.num_cpus=null"])
    assert loaded.train.epochs == 8
    assert loaded.train.finding_names() == ("Hernia", "Mass")
    assert loaded.ray.num_cpus is None


def test_missing_file_and_folder(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert refusal(path=missing) == f"--config {missing}: No such file or directory; name an existing TOML file"
    assert refusal(path=tmp_path) == f"--config {tmp_path}: Is a directory; name an existing TOML file"


@pytest.mark.parametrize("text", ["train", "[train\n", "train: {epochs: 3}", "x = " + "[" * 3000, "x = " + "9" * 5000])
def test_file_that_is_not_toml(tmp_path: Path, text: str) -> None:
    path = toml(tmp_path, text)
    assert refusal(path=path).startswith(f"--config {path}: not TOML: ")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "picture.toml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    assert refusal(path=path).startswith(f"--config {path}: not TOML: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train = 3", "train is a section: write [train] and its keys below"),
        ("train = []", "train is a section: write [train] and its keys below"),
        ("epochs = 3", "unknown key 'epochs'"),
        ("[trian]\nepochs = 3", "unknown key 'trian'; did you mean 'train'?"),
        ("[train]\nepoch = 3", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("[train]\nepochs = 0", "train.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("[train.dense]\na = 3", "train.dense: Input should be a valid tuple"),
    ],
)
def test_file_is_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    path = toml(tmp_path, text)
    assert refusal("epochs=5", path=path) == f"--config {path}: {expected}"


def test_several_errors_stand_in_one_line(tmp_path: Path) -> None:
    path = toml(tmp_path, "[train]\nepochs = 0\nbatch = 3\n[ray]\nnum_gpus = -1\n")
    text = refusal(path=path)
    assert "train.epochs: " in text
    assert "unknown key 'train.batch'; did you mean 'batch_size'?" in text
    assert "ray.num_gpus: " in text


def test_settings_are_frozen() -> None:
    settings = config.TrainSettings()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.epochs = 3


def test_replace_makes_a_validated_copy() -> None:
    settings = config.TrainSettings()
    other = settings.replace(epochs=3, findings=["Mass"])
    assert (other.epochs, other.findings) == (3, ("Mass",))
    assert settings.epochs == 10
    with pytest.raises(ConfigError, match=r"^epochs: Input should be greater than or equal to 1 \(got 0\)$"):
        settings.replace(epochs=0)
    with pytest.raises(ConfigError, match=r"^unknown key 'epoch'; did you mean 'epochs'\?$"):
        settings.replace(epoch=3)


def test_build_names_the_place() -> None:
    with pytest.raises(ConfigError, match=r"^import-weights: size: .*\(got 8\)$"):
        config.build(config.InputSpec, {"size": 8}, where="import-weights")


def test_prepare_spec() -> None:
    settings = config.PrepareSettings(sizes=(64,), aspect="pad", interpolation="cubic")
    assert settings.spec(64) == config.InputSpec(size=64, aspect="pad", interpolation="cubic")


def outcome(path: str | Path | None, overrides: list[str] | None = None) -> str:
    """`fine`, or the message of the one kind of error that there may be."""
    try:
        loaded = config.load(path, overrides or [])
    except ConfigError as error:
        return str(error)
    assert loaded.train.finding_names()
    return "fine"


KEYS = st.sampled_from(
    [
        f"{section}.{field}"
        for section, kind in config.Config.model_fields.items()
        for field in kind.default.model_dump()
    ]
)
VALUES = st.one_of(
    st.text(),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.one_of(st.integers(), st.text(alphabet="abc'\"[]{}=,"))).map(str),
    st.sampled_from(
        ["null", "true", "[]", "{}", "[[]]", "{a=1}", "1979-05-27", "''", "'''\n'''", "nan", "inf", "0x1f"]
    ),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.text(), st.tuples(KEYS, VALUES).map("=".join)), max_size=3))
@example(["\ud800=3"])
@example(["weights=\ud800"])
@example(["train.findings.x=3"])
def test_any_override_gives_settings_or_one_line(overrides: list[str]) -> None:
    message = outcome(None, overrides)
    assert len(message.splitlines()) == 1


@settings(deadline=None, max_examples=100)
@given(st.binary())
def test_any_file_gives_settings_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    assert len(outcome(path).splitlines()) == 1


def test_settings_without_effect_are_named() -> None:
    chosen = config.TrainSettings(momentum=0.5, focal_gamma=1.0, plateau_factor=0.5, loss="focal")
    assert chosen.idle() == ["momentum (optimizer is not sgd)", "plateau_factor (schedule is not plateau)"]
    assert config.TrainSettings().idle() == []
    assert config.TrainSettings(epochs=2, frozen_epochs=2, warmup_epochs=1).idle() == [
        "warmup_epochs (all epochs are frozen)"
    ]


@pytest.mark.parametrize("bad", ["youdn", "youden=1", "sensitivity", "sensitivity=1.0", "specificity=x", "auroc=0.5"])
def test_operating_points_have_a_rule(bad: str) -> None:
    with pytest.raises(ConfigError, match="sensitivity=X or specificity=X"):
        config.load(None, [f"operating_point={bad}"])
    assert config.load(None, ["operating_point=sensitivity=0.9"]).train.operating_point == "sensitivity=0.9"
