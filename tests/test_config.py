"""Settings: frozen, within ranges, and refused with one line that names the place."""

from __future__ import annotations

from pathlib import Path

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


def toml(folder: Path, data: str | bytes) -> Path:
    path = folder / "settings.toml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_defaults() -> None:
    loaded = config.load(None)
    assert loaded == config.Config()
    assert loaded.train.flip is False, "a mirrored chest is another diagnosis"
    assert loaded.train.finding_names()[0] == "Atelectasis"
    chosen = config.PrepareSettings(sizes=(64,), aspect="pad", interpolation="cubic")
    assert chosen.spec(64) == config.InputSpec(size=64, aspect="pad", interpolation="cubic")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("epoch=3", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("train.=1", "unknown key 'train.'"),
        ("epochs=0", "train.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("epochs=" + "9" * 5000, "train.epochs: "),
        ("seed=2147483648", "train.seed: "),
        ("dropout=1.0", "train.dropout: Input should be less than 1 (got 1.0)"),
        ("backbone=ResNet51", "train.backbone: Input should be 'ResNet50', "),
        ("dense=" + "[" * 3000, "train.dense: "),
        ("findings=", "train.findings: the list is empty"),
        ("findings=Mass,Nodul", "train.findings: unknown finding 'Nodul'; did you mean 'Nodule'?"),
        ("prepare.sizes=[]", "prepare.sizes: "),
        ("prepare.sizes=[31]", "greater than or equal to 32 (got 31)"),
        *((f"operating_point={rule}", "sensitivity=X") for rule in ("youden=1", "npv=1.0", "flag_rate=x")),
        *((text, "write it as key=value") for text in ("epochs", "=3", "", " = 3", "a\nb", "epochs\r\n")),
        ("a\nb=3", "unknown key"),
        ("epochs='''x\ny'''", "train.epochs: "),
    ],
)
def test_bad_override_is_refused_with_place_value_and_rule(override: str, part: str) -> None:
    message = refusal(override)
    assert message.startswith("--set ")
    assert part in message


def test_override_sets_value_and_type() -> None:
    for override, section, field, value in (
        ("ray.num_cpus=2", "ray", "num_cpus", 2),
        (" epochs = 3 ", "train", "epochs", 3),
        ("dense=[256, 128]", "train", "dense", (256, 128)),
        ("weights=runs/a=b.h5", "train", "weights", "runs/a=b.h5"),
        ("findings=Mass,Nodule", "train", "findings", ("Mass", "Nodule")),
        ("prepare.sizes=[320, 224, 320]", "prepare", "sizes", (224, 320)),
        ("ray.address=ray://head:10001", "ray", "address", "ray://head:10001"),
        ("operating_point=any_flag_rate=0.2", "train", "operating_point", "any_flag_rate=0.2"),
        ('operating_point=" any_flag_rate = 0.2 "', "train", "operating_point", "any_flag_rate=0.2"),
        ('operating_point=" youden"', "train", "operating_point", "youden"),
    ):
        found = getattr(getattr(config.load(None, [override]), section), field)
        assert (found, type(found)) == (value, type(value))


def test_later_override_wins_and_the_default_section_is_the_commands(tmp_path: Path) -> None:
    assert config.load(None, ["epochs=3", "epochs=4"]).train.epochs == 4
    assert config.load(None, ["batch_size=4"], section="score").score.batch_size == 4
    assert "'score.epochs'" in refusal("epochs=4", section="score")
    path = toml(tmp_path, '[train]\nepochs = 7\nfindings = ["Mass", "Hernia"]\n[ray]\nnum_cpus = 2\n')
    loaded = config.load(path, ["train.epochs=8", "ray.num_cpus=null"])
    assert (loaded.train.epochs, loaded.ray.num_cpus) == (8, None)
    assert loaded.train.finding_names() == ("Hernia", "Mass")


def test_bad_file_is_refused_by_name_in_one_line(tmp_path: Path) -> None:
    for data, part in (
        *((text, "not TOML: ") for text in ("train", "[train\n", "train: {epochs: 3}", "x = " + "[" * 3000)),
        (b"\x89PNG\xff\xfe", "not TOML: "),
        ("train = 3", "train is a section"),
        ("[trian]\nepochs = 3", "unknown key 'trian'; did you mean 'train'?"),
    ):
        path = toml(tmp_path, data)
        assert refusal("epochs=5", path=path).startswith(f"--config {path}: {part}")
    for path in (tmp_path / "none.toml", tmp_path):
        assert refusal(path=path).startswith(f"--config {path}: ")
    message = refusal(path=toml(tmp_path, "[train]\nepochs = 0\nbatch = 3\n[ray]\nnum_gpus = -1\n"))
    for part in ("train.epochs: ", "'train.batch'; did you mean 'batch_size'", "ray.num_gpus: "):
        assert part in message


def test_byte_order_mark_of_a_file_is_ignored(tmp_path: Path) -> None:
    assert config.load(toml(tmp_path, b"\xef\xbb\xbf[train]\r\nepochs = 7\r\n")).train.epochs == 7
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        mark = "" if encoding == "utf-16" else "\ufeff"
        path = toml(tmp_path, (mark + "[train]\nepochs = 7\n").encode(encoding))
        assert refusal(path=path) == f"--config {path}: not TOML: encoded in UTF-16; save it as UTF-8"
    path = toml(tmp_path, "# Größe\n".encode("latin-1"))
    assert refusal(path=path) == f"--config {path}: not TOML: not UTF-8 at byte 4; save it as UTF-8"


def test_settings_are_frozen_and_replace_validates_a_copy() -> None:
    original = config.TrainSettings()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        original.epochs = 3
    other = original.replace(epochs=3, findings=["Mass"])
    assert (other.epochs, other.findings, original.epochs) == (3, ("Mass",), 10)
    with pytest.raises(ConfigError, match=r"^epochs: .*\(got 0\)$"):
        original.replace(epochs=0)
    with pytest.raises(ConfigError, match="'epoch'; did you mean 'epochs'"):
        original.replace(epoch=3)
    with pytest.raises(ConfigError, match=r"^import-weights: size: .*\(got 8\)$"):
        config.build(config.InputSpec, {"size": 8}, where="import-weights")


def test_settings_without_effect_are_named() -> None:
    chosen = config.TrainSettings(momentum=0.5, focal_gamma=1.0, plateau_factor=0.5, loss="focal", balance="findings")
    assert chosen.list_unused() == [
        "momentum (optimizer is not sgd)",
        "balance (loss is not weighted_bce)",
        "plateau_factor (schedule is not plateau)",
    ]
    assert config.TrainSettings().list_unused() == []
    frozen = config.TrainSettings(epochs=2, frozen_epochs=2, warmup_epochs=1)
    assert frozen.list_unused() == ["warmup_epochs (all epochs are frozen)"]
    without = config.TrainSettings(backbone="ConvNeXtTiny", batchnorm_images=64)
    assert without.list_unused() == ["batchnorm_images (ConvNeXtTiny has no BatchNorm)"]


SECTIONS = config.Config.model_fields.items()
KEYS = st.sampled_from([f"{section}.{field}" for section, kind in SECTIONS for field in kind.default.model_dump()])
WORDS = ["null", "true", "[]", "{}", "[[]]", "{a=1}", "1979-05-27", "''", "'''\n'''", "nan", "inf", "0x1f"]
LISTS = st.lists(st.one_of(st.integers(), st.text(alphabet="abc'\"[]{}=,")))
VALUES = st.one_of(st.text(), st.sampled_from(WORDS), st.one_of(st.integers(), st.floats(), LISTS).map(str))


@settings(max_examples=100)
@given(st.lists(st.one_of(st.text(), st.tuples(KEYS, VALUES).map("=".join)), max_size=3), st.none() | st.binary())
@example(["\ud800=3"], None)
@example(["weights=\ud800"], None)
@example(["train.findings.x=3"], None)
def test_any_overrides_and_file_are_settings_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], data: bytes | None
) -> None:
    try:
        loaded = config.load(None if data is None else toml(tmp_path_factory.getbasetemp(), data), overrides)
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        lines = list(loaded.train.finding_names()[:1])
    assert len(lines) == 1
