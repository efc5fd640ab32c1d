"""What a run of `score` takes, from a sample of the user's images and from the last run in the same folder."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.costs import MIN_RUN_S, RAY_S, Cost, Rate
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.imaging import overlays
from ray_cxr.imaging.sample import Sample, decode_sample
from ray_cxr.imaging.sandbox import DecodedImage
from ray_cxr.models import predictions
from ray_cxr.models.occlusion import Occlusion
from ray_cxr.models.runtime import default_threads
from ray_cxr.progress import silence_stderr
from ray_cxr.scoring.heatmaps import BATCH_SIZE, HeatMapRequest
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
    counts = f"{report.rows:,} rows, {rows:,} of them to score"
    counts += "" if report.heatmaps is None else f", heat maps of up to {maps:,} to draw"
    if not rows and not maps:
        return Cost(counts, {}, (0.0, 0.0), {})
    use_gpu, settings = plan.request.use_gpu, plan.request.settings
    shown = InputSpec(size=plan.drawing.side, aspect="pad") if plan.drawing else None
    specs = [plan.bundle.input_spec, *([shown] if shown else [])]
    limits = {"max_pixels": settings.max_pixels, "timeout_s": settings.decode_timeout_s}
    if plan.prepared is None:
        sample = decode_sample(plan.rows.paths.slice(0, report.rows), specs, **limits)  # type: ignore[arg-type]
    else:
        sample = read_sample(plan.prepared)
    known = _read_rates(plan)
    rates: dict[str, Rate] = {}
    sizes = {"scores": rows * (_ROW_BYTES + _FINDING_BYTES * len(plan.bundle.findings))}
    if plan.request.features:
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
        drawing = _draw_sample(plan, plan.drawing, sample, table, cpus)
        if known.get("heat maps") is None and use_gpu:
            unknown = _NO_GPU_RATE
        else:
            each = sample.seconds / cpus + drawing.seconds
            rates["heat maps"] = known.get("heat maps") or Rate(1 / each, source)
            seconds += drawing.start + maps / rates["heat maps"].per_second
        drawn = f"overlays ({settings.heatmap_images})"
        sizes |= {"maps": round(maps * drawing.map_bytes), drawn: round(maps * drawing.overlay_bytes)}
    failed = f"{sample.failed} of {sample.count} images that were tried could not be read"
    return Cost(
        counts, rates, None if unknown else (seconds, seconds), sizes, unknown, [failed] if sample.failed else []
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
    """Compute the maps of the sample and draw some overlays, as `HeatMapWriter` does."""
    bundle, batch_size = plan.bundle, BATCH_SIZE[False]
    started = time.monotonic()
    p = table[[f"p_{name}" for name in bundle.findings]].to_numpy(np.float32)
    chosen = predictions.order_findings(p, bundle.rules)[:, : request.count]
    images, numbers = sample.images[:batch_size], chosen[:batch_size].astype(np.int32)
    pixels = np.zeros((batch_size, *images[0].images[0].shape, 1), np.uint8)
    pixels[: len(images), ..., 0] = [image.images[0] for image in images]
    numbers = np.pad(numbers, ((0, batch_size - len(numbers)), (0, 0)))
    cam: Any
    if request.method == "occlusion":
        cam = Occlusion(bundle.open_runtime(plan.settings["precision"], batch_size=batch_size, threads=cpus))
        started = time.monotonic()
        maps, _ = cam.explain(pixels[:2], numbers[:2])
        seconds = (time.monotonic() - started) / 2
    else:
        with silence_stderr():
            from ray_cxr.models.explain import GradCam  # imports TensorFlow, which prints

            cam = GradCam(bundle.model(), request.method)
            cam.explain(pixels, numbers)
            traced = time.monotonic()
            maps, _ = cam.explain(pixels, numbers)
            seconds = (time.monotonic() - traced) / batch_size
    start = time.monotonic() - started
    drawn = _choose_overlays(plan, request, table, chosen)
    cells = [len(zlib.compress(part.tobytes())) for image in maps[: len(images)] for part in image]
    map_bytes = request.count * (_MAP_BYTES + _CELL_FACTOR * float(np.mean(cells)))
    overlay_bytes = overlay_s = 0.0
    if drawn.any():
        started, sizes = time.monotonic(), []
        for n in range(min(_OVERLAYS, len(maps), len(images))):
            sizes.append(len(_encode_overlay(plan, request, images[n], maps[n, 0])))
        each = drawn.sum(axis=1).mean()
        overlay_bytes, overlay_s = each * float(np.mean(sizes)), each * (time.monotonic() - started) / len(sizes)
    return _Drawing(start, seconds + overlay_s / cpus, overlay_bytes, map_bytes)


def _choose_overlays(plan: ScorePlan, request: HeatMapRequest, table: Any, chosen: np.ndarray) -> np.ndarray:
    """Return which maps of each image are drawn over it, bool [n,K]; see `config.ScoreSettings.heatmap_images`."""
    flags = table[[f"flag_{name}" for name in plan.bundle.findings]]
    if request.overlays != "flagged":
        return np.full(chosen.shape, request.overlays == "all")
    if flags.isna().to_numpy().all():
        return np.arange(chosen.shape[1])[None] == np.zeros((len(chosen), 1))
    return np.take_along_axis(flags.fillna(False).to_numpy(bool), chosen, axis=1)


def _encode_overlay(plan: ScorePlan, request: HeatMapRequest, image: DecodedImage, cells: np.ndarray) -> bytes:
    assert image.shape is not None
    shown = overlays.crop_padding(image.images[1], InputSpec(size=request.side, aspect="pad"), image.shape)
    area = overlays.compute_area(plan.bundle.input_spec, *image.shape)
    return overlays.encode_jpeg(overlays.draw_overlay(shown, cells, area, side=request.side))
