"""Shared fixtures: small phantoms, a bundle without training, and one Ray for all tests that need it."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import runpy
import shlex
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import pytest

from ray_cxr import progress, session
from ray_cxr.session import OWN_RAY

# A second conftest.py would replace this module, from which tests import.
pytest_plugins = ["review_fixtures"]

# The gate tries the same examples on every machine, without a time limit.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")

# Commands in the test's process print no line because they are slow on a loaded machine.
progress.SILENT_S = 1e6

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# `start_ray` sets them before it imports Ray, whose C++ reads them once; some test files import Ray earlier.
for _name, _value in OWN_RAY.items():
    os.environ.setdefault(_name, _value)
# Dummy credentials for the tests' S3 server, set before Ray starts because its workers keep the environment.
os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="nothing-secret", AWS_EC2_METADATA_DISABLED="true")
for _name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
    os.environ.pop(_name, None)

# `RAY_CXR_TEST_NO_BF16=1 scripts/test` imitates a CPU without bfloat16, also in child processes and Ray's workers.
if os.environ.get("RAY_CXR_TEST_NO_BF16"):
    _folder = str(Path(__file__).parent / "no_bf16")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_folder, os.environ.get("PYTHONPATH")]))
    runpy.run_path(f"{_folder}/sitecustomize.py")

#: Stand for data that a command does not know, in the next command that it prints.
PLACEHOLDERS = {"IMAGES", "BUNDLE", "M.parquet"}
SHARED = Path(__file__).parents[1].parent / "shared"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the total time of the tests with Ray and of those without."""
    parts: dict[str, list[pytest.TestReport]] = {"with Ray": [], "without Ray": []}
    for report in itertools.chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            parts["with Ray" if "ray" in report.keywords else "without Ray"].append(report)
    for part, reports in parts.items():
        if tests := {report.nodeid for report in reports}:
            seconds = sum(report.duration for report in reports)
            terminalreporter.write_line(f"{part}: {len(tests)} tests, {seconds:.0f} s of one process")


@pytest.fixture(autouse=True)
def forbid_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that starts a Ray of its own, which takes long, without the mark `ray`, `long` or `readme`."""
    start = session._init_ray

    def refuse(*arguments: Any) -> None:
        import ray

        if ray.init.__module__.startswith("ray."):
            pytest.fail("the test starts Ray: mark it `ray`, or use the fixture `without_ray`")
        start(*arguments)  # the test replaces ray.init

    with pytest.MonkeyPatch.context() as patch:
        if not {"ray", "long", "readme"} & {mark.name for mark in request.node.iter_markers()}:
            patch.setattr(session, "_init_ray", refuse)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real images and tables; tests skip without it."""
    if not (SHARED / "nih").is_dir():
        pytest.skip(f"real images not found: {SHARED / 'nih'} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory):
    """Write 24 synthetic patients, and six with broken files."""
    from ray_cxr.imaging.phantoms import write_phantoms

    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=24, size=128)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory):
    """Write a TinyCNN with random weights; only some findings have calibration and operating points."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def make_tiny_bundle(
    out: Path,
    weights: Any = None,
    images: Any = None,
    *,
    seed: int = 0,
    size: int = 64,
    findings: tuple[str, ...] | None = None,
    **changes: Any,
):
    """Write a bundle without training, with fields of its content changed; each seed gives other random weights."""
    from dataclasses import replace

    import keras
    import pyarrow as pa

    from ray_cxr.config import InputSpec
    from ray_cxr.labels import FINDINGS
    from ray_cxr.models import classifier
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.models.bundle import SPLIT_SCHEMA
    from ray_cxr.models.bundle_writer import BundleContent, write_bundle

    names = findings or FINDINGS
    architecture = Architecture(backbone="TinyCNN", size=size, findings=names)
    keras.utils.set_random_seed(seed)
    model = classifier.build(architecture)
    point = {"threshold": 0.5, "rule": "youden", "sensitivity": 0.5, "specificity": 0.5, "flag_rate": 0.5}
    content = BundleContent(
        architecture=architecture,
        input_spec=InputSpec(size=size),
        calibration={
            name: {"method": "platt", "slope": 2.0, "intercept": -1.0} if i % 2 else None
            for i, name in enumerate(names)
        },
        operating_points={name: point if i % 3 else None for i, name in enumerate(names)},
        expected_flag_rates={name: 0.5 if i % 3 else None for i, name in enumerate(names)},
        provenance={
            "origin": "made by a test",
            "initial_weights": "random",
            "age_range": [10.0, 90.0],
            "split": {"kind": "patient", "seed": 0, "fractions": [0.7, 0.1, 0.2]},
            "versions": {"ray-cxr": "test"},
        },
        config_toml='[train]\nbackbone = "TinyCNN"\n',
        curves=[{"epoch": 1, "loss": 0.5, "val_auroc": None}],
        split=pa.table(
            {"image_id": ["00000099_000.png"], "patient_id": ["99"], "split": ["train"]}, schema=SPLIT_SCHEMA
        ),
    )
    return write_bundle(out, replace(content, **changes), weights or model, images=images)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Run one Ray of two CPUs for the session; commands connect to it.

    The environment of its processes has a proxy that accepts connections and never answers, as in a hospital.
    """
    from ray_cxr.config import RaySettings
    from ray_cxr.session import start_ray

    with contextlib.ExitStack() as stack, socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("http_proxy", "https_proxy"):
            environment.setenv(name, "http://127.0.0.1:{1}".format(*proxy.getsockname()))
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            environment.setenv(name, "")  # restored at the end
        # The dashboard frees the resources of stopped trials.
        with start_ray(RaySettings(num_cpus=2), dashboard=True):
            import ray

            assert ray.is_initialized()
            for name in ("http_proxy", "https_proxy"):
                environment.delenv(name)
            yield


class Bucket(NamedTuple):
    """An S3 bucket on this machine.

    Attributes:
        client: boto3's client, an oracle independent of Arrow.
        options: query string for its addresses.
        endpoint: address of the server.
    """

    client: Any
    options: str
    endpoint: str

    def __call__(self, key: str) -> str:
        return f"s3://chests/{key}{self.options}"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="chests", Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket="chests", Key=key)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="chests", Key=key, Body=data)

    def upload(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
    client.create_bucket(Bucket="chests")
    yield Bucket(client, f"?endpoint_override={address}&scheme=http", f"http://{address}")
    server.stop()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; return (exit code, stdout, stderr). If it is done, it must name the next one."""
    from ray_cxr.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(item) for item in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        words = list(map(str, arguments))
        if (
            code == 0
            and words
            and not {"help", "--help", "--version", "completion"} & set(words)
            and "".join(words).isprintable()
        ):
            read_next(out)
        return code, out, err

    return run


def read_next(output: str) -> list[str]:
    """Return the words after `ray-cxr` in a command's last line, which must parse and name files that exist."""
    from ray_cxr.cli import _build_parser

    *lines, last = output.splitlines()
    assert last.startswith("next: ray-cxr ")
    assert not any(line.startswith("next:") for line in lines)
    words = shlex.split(last.removeprefix("next: ray-cxr "))
    given = vars(_build_parser().parse_args(words))
    inputs = [given.get(name) for name in ("model", "bundle", "prepared", "manifest", "scores", "labels", "images")]
    several = itertools.chain.from_iterable(item if isinstance(item, list) else [item] for item in inputs)
    for path in filter(None, several):
        assert path in PLACEHOLDERS or "://" in path or Path(path).exists(), path
    return words


@pytest.fixture(scope="session")
def manifest(phantoms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a manifest of the phantoms, split by patient."""
    return write_phantom_manifest(phantoms, tmp_path_factory.mktemp("manifest") / "m.parquet")


def write_phantom_manifest(drawn: Any, path: Path) -> Path:
    from ray_cxr.data.manifest import write_manifest
    from ray_cxr.data.manifest_builder import build_manifest

    options: dict[str, Any] = {"split": "patient", "fractions": (0.6, 0.2, 0.2), "seed": 1}
    write_manifest(build_manifest([str(drawn.table)], images=str(drawn.images), **options)[0], path)
    return path


def write_noise(folder: Path) -> list[Path]:
    """Write six PNGs of 900 x 900 pixels that take long to decode."""
    import numpy as np
    from PIL import Image

    paths, noise = [folder / f"{number}.png" for number in range(6)], np.random.default_rng(0)
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (900, 900), dtype=np.uint8)).save(path, compress_level=1)
    return paths


class InProcessDataset:
    """Replace a Ray dataset: run the same functions and actors in this process, row by row."""

    def __init__(self, rows: Iterable[Any], **_: Any) -> None:
        self._rows = rows
        self.context = SimpleNamespace(max_errored_blocks=0, autoscaling_config=SimpleNamespace())

    def map(self, call: Any, *, fn_kwargs: Any = None, fn_constructor_kwargs: Any = None, **_: Any) -> InProcessDataset:
        function = call(**fn_constructor_kwargs or {}) if isinstance(call, type) else call
        return InProcessDataset(function(row, **fn_kwargs or {}) for row in self._rows)

    def flat_map(self, call: Any, *, fn_kwargs: Any = None, **_: Any) -> InProcessDataset:
        return InProcessDataset(made for row in self._rows for made in call(row, **fn_kwargs or {}))

    def iter_rows(self) -> Iterator[Any]:
        return iter(self._rows)


@contextlib.contextmanager
def replace_ray() -> Iterator[None]:
    """Run `prepare`, `score` and heat maps in this process, for tests of their output only."""
    import ray.data

    from ray_cxr import cluster

    node = {"NodeID": "here", "Alive": True, "NodeManagerAddress": "127.0.0.1", "Resources": {"CPU": 2.0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data, "from_items", InProcessDataset)
        patch.setattr(cluster, "list_alive", lambda: [node])
        patch.setattr(session, "start_ray", lambda *_, **__: contextlib.nullcontext())
        yield


@pytest.fixture
def without_ray() -> Iterator[None]:
    """Run `prepare`, `score` and heat maps in this process, without Ray."""
    with replace_ray():
        yield


@pytest.fixture(scope="session")
def prepared(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the phantoms at 64 and 96 pixels in shards of 16, without Ray."""
    from ray_cxr.config import PrepareSettings
    from ray_cxr.data.prepared import prepare

    out = tmp_path_factory.mktemp("prepared") / "set"
    with replace_ray():
        prepare(manifest, out, PrepareSettings(sizes=(64, 96), rows_per_shard=16))
    return out


@pytest.fixture(scope="session")
def scores(tiny_bundle: Any, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score the phantoms with `tiny_bundle` in fp32, 16 rows per file, without Ray. Copy the folder before a change."""
    from ray_cxr.cli import main

    out = tmp_path_factory.mktemp("scores") / "out"
    with replace_ray(), contextlib.redirect_stdout(io.StringIO()):
        assert main(score_arguments(tiny_bundle.path, manifest, out)) == 0
    return out


def score_arguments(bundle: Path, manifest: Path, out: Path, *more: object) -> list[str]:
    """Return the arguments of `score` that the fixture `scores` uses."""
    given = ["score", "--model", bundle, "--manifest", manifest, "--out", out, "--precision", "fp32"]
    return [*map(str, given), "--set", "rows_per_file=16", "--set", "batch_size=8", *map(str, more)]


class Run(NamedTuple):
    """A finished `train`: its folder, arguments and standard output."""

    out: Path
    arguments: list[str]
    output: str


@pytest.fixture(scope="session")
def uninterrupted(shared_ray: None, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train with two workers and without interruption; `patience` ends the run after a worse epoch."""
    from test_kill import arguments

    from ray_cxr.cli import main

    out = tmp_path_factory.mktemp("train") / "run"
    # Without checkpoints during an epoch: the killed runs have them, and the results must be the same.
    given = arguments(prepared, out, 2, checkpoint_steps=1000)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(given) == 0
    return Run(out, given, output.getvalue())
