"""`benchmark`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.table import Table

from ray_cxr import config, costs, environment
from ray_cxr.cli.arguments import add_command, add_settings, any_address, local_output, override_settings
from ray_cxr.cli.next_step import IMAGES, place_next_to, print_next
from ray_cxr.cli.output import explain_write_errors, print_line, print_table, print_warnings
from ray_cxr.errors import ConfigError
from ray_cxr.progress import Stage, format_duration
from ray_cxr.storage import atomic, remote

if TYPE_CHECKING:
    from ray_cxr.scoring.benchmark import Benchmark, Measurement

#: Images of ChestX-ray14.
COUNT = 112_120


def add_commands(commands: Any) -> None:
    benchmark = add_command(
        commands,
        "benchmark",
        _benchmark,
        "measure what this machine decodes and scores per second, in about a minute",
        ["run/bundle", "run/bundle --images images --precision int8 --count 500000 --json speed.json"],
    )
    benchmark.add_input("--bundle", metavar="BUNDLE", dest="bundle", text="model, such as RUN/bundle of train")
    images_help = "measure with some of the images below a folder or URI (synthetic radiographs)"
    benchmark.add_argument("--images", type=any_address, metavar="DIR_OR_URI", help=images_help)
    precisions = get_args(config.Precision)
    benchmark.add_argument("--precision", choices=precisions, help="auto: all that bundle and machine support")
    count_help = f"number of images to predict the time for ({COUNT:,}, ChestX-ray14)"
    benchmark.add_argument("--count", type=int, default=COUNT, metavar="N", help=count_help)
    seconds_help = "about how long to measure, without the start (40)"
    benchmark.add_argument("--seconds", type=float, default=40.0, metavar="S", help=seconds_help)
    benchmark.add_argument("--json", type=local_output, metavar="FILE", help="also write everything to a JSON file")
    add_settings(benchmark, "score", "ray", gpu=True)


def _benchmark(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="score")
    for option, value in (("--count", arguments.count), ("--seconds", arguments.seconds)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} {value}: must be a number greater than 0")
    if settings.ray.address:
        raise ConfigError("ray.address: benchmark measures this machine alone, without Ray; remove it")
    if arguments.json is not None and Path(arguments.json).is_dir():
        raise ConfigError(f"--json {arguments.json}: is a folder; pass the name of a file")
    if arguments.json is not None and not Path(arguments.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: its folder does not exist; create it first")
    with Stage("checking the model", in_log=False):
        from ray_cxr.scoring.benchmark import BenchmarkRequest, run_benchmark

    environment.prepare_for_ray()  # which counts the CPUs, as for score
    if arguments.gpu and not environment.count_gpus():
        raise ConfigError("--gpu: this machine has no GPU that CUDA can use; omit --gpu")
    request = BenchmarkRequest(
        model=arguments.bundle,
        settings=override_settings(settings.score, arguments, "precision"),
        cpus=settings.ray.num_cpus or environment.count_cpus(),
        images=arguments.images,
        use_gpu=arguments.gpu,
        seconds=arguments.seconds,
    )
    result = run_benchmark(request)
    _print_result(result, arguments.count)
    if arguments.json is not None:
        with explain_write_errors(arguments.json, "--json"):
            atomic.write_text(Path(arguments.json), json.dumps(result.to_record(arguments.count), indent=1) + "\n")
        print_line(f"results: {arguments.json}")
    bundle, gpu = remote.to_path(arguments.bundle), ["--gpu"] if arguments.gpu else []
    out = place_next_to(bundle.parent if bundle.name == "bundle" else bundle, "scores")
    source = ["--images", arguments.images or IMAGES]
    requested = request.settings.precision
    precision = result.fastest if requested == "auto" else requested
    chosen = [] if precision is None else ["--precision", precision]
    print_next("score", bundle, *source, "--out", out, *chosen, *gpu)


def _print_result(result: Benchmark, count: int) -> None:
    print_warnings([text] if (text := result.describe_load()) else [])
    for line in result.list_conditions():
        print_line(line)
    names = ("part", "precision", "images/s", "lowest", "highest", "CPU ms\nper image", f"{count:,}\nimages", "memory")
    table = Table(*names, title="Speed")
    for found in result.measurements:
        table.add_row(*_format_row(found, count))
    print_table(table, optional=("memory", "lowest", "highest"))
    for line in result.list_findings():
        print_line(line)


def _format_row(found: Measurement, count: int) -> list[str]:
    rates = [f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}" for rate in (found.rate, *found.range)]
    memory = costs.format_size(found.memory) + (f", GPU {costs.format_size(found.gpu_memory)}" * bool(found.gpu_memory))
    hours = found.predict_hours(count)
    duration = "" if hours is None else format_duration(3600 * hours)
    return [found.part, found.precision or "", *rates, f"{found.cpu_ms:.1f}", duration, memory]
