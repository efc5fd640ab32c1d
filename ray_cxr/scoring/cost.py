"""What a run of `score` takes, from a sample of the user's images and from the last run in the same folder."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.costs import MIN_RUN_S, RAY_S, Cost, Rate
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.imaging.demographics import count_of
from ray_cxr.imaging.sample import Sample, decode_sample
from ray_cxr.imaging.sandbox import DecodedImage
from ray_cxr.models import predictions
from ray_cxr.models.occlusion import Occlusion
from ray_cxr.models.runtime import default_threads
from ray_cxr.progress import silence_stderr
from ray_cxr.scoring.heatmaps import (
    BATCH_SIZE,
    HeatMapRequest,
    choose_findings,
    choose_overlays,
    describe_shown,
    encode_overlay,
    widen_request,
)
from ray_cxr.scoring.plan import ScorePlan, preview_run
from ray_cxr.scoring.prepared_reader import read_sample
from ray_cxr.storage import run_folder

#: Bytes of a row of scores without the columns of findings, per finding, and of a map without its cells.
_ROW_BYTES, _FINDING_BYTES, _MAP_BYTES = 60, 12, 50
#: Bytes in the file of maps per byte of the compressed cells.
_CELL_FACTOR = 1.5
#: Overlays that are drawn to measure their bytes.
_OVERLAYS = 8
_NO_GPU_RATE = "a GPU is measured by a run only; run a part with --limit, and see its images/s"


@dataclass(frozen=True)
class _Drawing:
    """Costs of heat maps: seconds to start, seconds per image, and bytes of overlays and of maps per image."""

    start: float
    seconds: float
    overlay_bytes: float
    map_bytes: float


def estimate_score(plan: ScorePlan, cpus: int) -> Cost:
    """Estimate a run from its plan, and write nothing.

    Args:
        cpus: CPUs that Ray would use.
    """
    report = preview_run(plan)
    rows, maps = report.counts["to score"], report.heatmaps.to_draw if report.heatmaps else 0
    counts = f"{count_of(report.rows, 'row')}, {rows:,} of them to score"
    counts += "" if report.heatmaps is None else f", heat maps of up to {maps:,} to draw"
    if not rows and not maps:
        return Cost(counts, {}, (0.0, 0.0), {})
    use_gpu, settings = plan.request.use_gpu, plan.request.settings
    specs = [plan.bundle.input_spec, *([describe_shown(plan.drawing.side)] if plan.drawing else [])]
    limits = {"max_pixels": settings.max_pixels, "timeout_s": settings.decode_timeout_s}
    if plan.prepared is None:
        sample = decode_sample(plan.rows.paths.slice(0, report.rows), specs, **limits)  # type: ignore[arg-type]
    else:
        sample = read_sample(plan.prepared)
    known = _read_rates(plan)
    rates: dict[str, Rate] = {}
    sizes = {"scores": rows * (_ROW_BYTES + _FINDING_BYTES * len(plan.bundle.findings))}
    if plan.has_features:
        sizes["features"] = rows * 2 * _count_features(plan)
    seconds, unknown = RAY_S, ""
    if not sample.images:
        return Cost(counts, {}, None, sizes, "none of the images that were tried could be read")
    source = f"measured on {len(sample.images)} of the images"
    threads = min(cpus, default_threads())  # of the sample
    table, scoring_s = _score_sample(plan, sample)
    if rows:
        if known.get("score") is None and use_gpu:
            unknown = _NO_GPU_RATE
        else:
            rates["score"] = known.get("score") or Rate(
                1 / (sample.seconds / cpus + scoring_s * threads / cpus), source
            )
            seconds += rows / rates["score"].per_second
    if maps and plan.drawing:
        request = plan.drawing
        if run_folder.has_settings(plan.out) and not plan.request.fresh:
            request = widen_request(plan.out, plan.to_draw, run_folder.digest_settings(plan.out), request)
        drawing = _draw_sample(plan, request, sample, table, cpus)
        if known.get("heat maps") is None and use_gpu:
            unknown = _NO_GPU_RATE
        else:
            each = sample.seconds / cpus + drawing.seconds
            rates["heat maps"] = known.get("heat maps") or Rate(1 / each, source)
            seconds += drawing.start + maps / rates["heat maps"].per_second
        drawn = f"overlays ({request.overlays})"
        sizes |= {"maps": round(maps * drawing.map_bytes), drawn: round(maps * drawing.overlay_bytes)}
    notes = []
    if transfer := sample.estimate_transfer(plan.request.pacs, rows + maps):
        rates["PACS"], seconds = transfer.rate, max(seconds, RAY_S + transfer.seconds)
        notes.append(transfer.describe())
    return Cost(
        counts,
        rates,
        None if unknown else (seconds, seconds),
        sizes,
        unknown,
        notes + sample.list_notes(),
    )


def _count_features(plan: ScorePlan) -> int:
    opened = plan.bundle.open_runtime("fp32", batch_size=1, threads=default_threads())
    return int(opened.predict(np.zeros((0, *opened.batch_shape[1:3]), np.uint8)).features.shape[1])


def _read_rates(plan: ScorePlan) -> dict[str, Rate]:
    """Return the rates of the last run in the same folder, if it took at least `MIN_RUN_S`."""
    run = run_folder.read_json(plan.out / "run.json")
    if run.get("use_gpu") != plan.request.use_gpu or run.get("model_digest") != plan.bundle.digest:
        return {}
    found = {"score": run.get("last_run"), "heat maps": (run.get("heatmaps") or {}).get("last_run")}
    return {
        name: Rate(last["images_per_second"], f"of the last run in {plan.out}")
        for name, last in found.items()
        if last and (last.get("seconds") or 0) >= MIN_RUN_S and last.get("images_per_second")
    }


def _score_sample(plan: ScorePlan, sample: Sample) -> tuple[Any, float]:
    """Return the score table of the sample, and the seconds per image that the model takes."""
    pixels = np.stack([image.images[0] for image in sample.images])
    options: dict[str, Any] = {"precision": plan.settings["precision"]}
    with silence_stderr():
        try:
            plan.bundle.predict(pixels[:1], **options)
            started = time.monotonic()
            table = plan.bundle.predict(pixels, **options)
        except (ConfigError, BundleError):
            if plan.request.use_gpu:  # a precision that only the GPU has
                return plan.bundle.predict(pixels, precision="auto"), 0.0
            raise
    return table, (time.monotonic() - started) / len(pixels) * plan.request.settings.tta


def _draw_sample(plan: ScorePlan, request: HeatMapRequest, sample: Sample, table: Any, cpus: int) -> _Drawing:
    """Compute the maps of a batch of the sample and draw some overlays, as `HeatMapWriter` does."""
    findings = plan.bundle.findings
    p = table[[f"p_{name}" for name in findings]].to_numpy(np.float32)
    flags = table[[f"flag_{name}" for name in findings]]
    has_flags, flagged = bool(flags.notna().to_numpy().any()), flags.fillna(False).to_numpy(bool)
    chosen, ranks = choose_findings(predictions.order_findings(p, plan.bundle.rules), flagged, request.count)
    images = sample.images[: BATCH_SIZE[False]]
    start, seconds, maps = _time_maps(plan, request, images, chosen, cpus)
    cells = [len(zlib.compress(part.tobytes())) for image in maps for part in image]
    map_bytes = float((ranks > 0).sum(axis=1).mean()) * (_MAP_BYTES + _CELL_FACTOR * float(np.mean(cells)))
    drawn = choose_overlays(request.overlays, chosen, flagged if has_flags else None) & (ranks > 0)
    each = float(drawn.sum(axis=1).mean())  # overlays per image
    if not each:
        return _Drawing(start, seconds, 0.0, map_bytes)
    shown, spec = list(zip(images, maps, strict=False))[:_OVERLAYS], plan.bundle.input_spec
    started = time.monotonic()
    sizes = [len(encode_overlay(image, ranked[0], spec, request.side)) for image, ranked in shown]
    overlay_s = (time.monotonic() - started) / len(sizes)
    return _Drawing(start, seconds + each * overlay_s / cpus, each * float(np.mean(sizes)), map_bytes)


def _time_maps(
    plan: ScorePlan, request: HeatMapRequest, images: Sequence[DecodedImage], chosen: np.ndarray, cpus: int
) -> tuple[float, float, np.ndarray]:
    """Return the seconds to start, the seconds per image, and the maps of the images, or of the first two of them."""
    started, size = time.monotonic(), BATCH_SIZE[False]
    # All batches of a run have one size.
    pixels = np.zeros((size, *images[0].images[0].shape, 1), np.uint8)
    pixels[: len(images), ..., 0] = [image.images[0] for image in images]
    numbers = np.pad(chosen[:size].astype(np.int32), ((0, max(0, size - len(chosen))), (0, 0)))
    cam: Any
    if request.method == "occlusion":
        runtime = plan.bundle.open_runtime(plan.settings["precision"], batch_size=size, threads=cpus)
        cam, n = Occlusion(runtime), 2  # slow, and the same for every image
    else:
        with silence_stderr():
            from ray_cxr.models.explain import GradCam  # imports TensorFlow, which prints

            cam, n = GradCam(plan.bundle.model(), request.method), size
            cam.explain(pixels, numbers)  # traces the model
    ready = time.monotonic()
    maps, _ = cam.explain(pixels[:n], numbers[:n])
    return ready - started, (time.monotonic() - ready) / n, maps[: len(images)]
