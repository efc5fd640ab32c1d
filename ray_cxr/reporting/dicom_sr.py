"""`export-sr`: write scores of DICOM radiographs as DICOM Structured Reports, which a PACS keeps next to the images.

There is one document per study, because radiologists read studies. It refers to every scored image of the study. If it
replaces an earlier document of the study, in this folder or in the folder of `--replaces`, it names that one.

    OUT/<SOP Instance UID>.dcm     the documents, see `sr_document`
    OUT/images.parquet             for each row of the scores, the outcome and the document that contains the image
    OUT/heatmaps/, heatmaps.parquet    with `--heatmaps`, see `captures`
    OUT/export.json                counts
    OUT/settings.json              settings that a later run must match
    OUT/_SUCCESS                   written last, unless an image failed

Documents contain the patient's name and ids, copied from the image's header. File names, messages and all other output
do not.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydicom.config
from pydicom.errors import InvalidDicomError
from pydicom.uid import ComprehensiveSRStorage

from ray_cxr import extras
from ray_cxr.config import PacsSettings
from ray_cxr.costs import count_cpus
from ray_cxr.errors import ErrorRateExceeded, InputError, OutputError, RayCxrError
from ray_cxr.imaging.overlays import EMPTY
from ray_cxr.progress import Progress
from ray_cxr.reporting import sr_studies
from ray_cxr.reporting.sr_studies import EXPORTED, FAILED, ExportPlan, ImageHeader, ReportContent, ScoreFolder
from ray_cxr.storage import atomic, dicomweb, remote, run_folder
from ray_cxr.storage.paths import is_dicomweb

KIND = "export-sr"
OUTCOME_TEXTS = {
    EXPORTED: "images exported",
    sr_studies.NOT_SCORED: "left out: they could not be scored",
    sr_studies.NOT_DICOM: "left out: they are not DICOM",
    sr_studies.REPEATED: "left out: another row has the same image (SOP Instance UID)",
}
CAPTURE_TEXTS = {
    sr_studies.CAPTURED: "flagged findings with a capture of their heat map",
    sr_studies.NO_MAP: "flagged findings without a heat map; a larger K of `score --heatmaps K` draws it",
    sr_studies.NOT_DRAWN: "flagged findings without a drawn heat map; run score with heatmap_images = 'flagged'",
    sr_studies.EMPTY: f"flagged findings with an empty heat map: {EMPTY}",
}
#: From this number of documents on, several processes are faster, although they need seconds to start.
_MIN_PARALLEL, _MAX_PROCESSES = 100, 32
_BATCH_REPORTS = 512
#: Earlier documents by study, each with the documents that it replaced.
_Documents = dict[str, dict[ImageHeader, tuple[ImageHeader, ...]]]


@dataclass
class Export:
    """The result of an export.

    Attributes:
        outcomes: number of rows of the scores by outcome.
        reasons: number of failed rows by reason.
        reports: number of documents of these scores in the folder.
        partial: number of documents that lack an image of their study.
        replacing: number of documents that name an earlier document of their study.
        written: number of documents that this run wrote.
        captures: number of flagged findings by the outcome of their heat map; None if heat maps are not exported.
        capture_reasons: number of failed heat maps by reason.
    """

    outcomes: Counter[str]
    reasons: Counter[str] = field(default_factory=Counter)
    reports: int = 0
    partial: int = 0
    replacing: int = 0
    written: int = 0
    captures: Counter[str] | None = None
    capture_reasons: Counter[str] = field(default_factory=Counter)

    def list_failures(self) -> list[str]:
        """Return a sentence for images, and one for heat maps, that failed: a missing report could stay unnoticed."""
        failures = []
        if self.outcomes[FAILED]:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
            others = "; all others are" if self.outcomes[EXPORTED] else ""
            failures.append(
                f"{self.outcomes[FAILED]:,} of {self.outcomes[FAILED] + self.outcomes[EXPORTED]:,} images could not be "
                f"exported ({reasons}){others}. images.parquet lists them"
            )
        if self.captures and self.captures[FAILED]:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.capture_reasons.most_common())
            failures.append(
                f"{self.captures[FAILED]:,} of {self.captures.total():,} heat maps could not be exported ({reasons}); "
                "heatmaps.parquet lists them"
            )
        return failures

    def raise_for_failures(self, *others: str) -> None:
        """Raise ErrorRateExceeded if an image or a heat map failed, or if there are `others`."""
        if failures := [*self.list_failures(), *others]:
            raise ErrorRateExceeded("; ".join(failures) + "; run the same command again to retry them", self)


def export_sr(
    scores: str | Path,
    out: str | Path,
    replaces: str | Path | None = None,
    *,
    with_heatmaps: bool = False,
    pacs: PacsSettings | None = None,
) -> Export:
    """Write a structured report for every study that has a scored DICOM image in a finished folder of `ray-cxr score`.

    The same call continues a run that was stopped or in which images failed. It does not repeat a finished run.

    Args:
        replaces: a folder of an earlier export, whose documents of the same studies the new ones name as predecessors.
        with_heatmaps: also write the heat maps of flagged findings as Secondary Captures.
        pacs: how to reach the PACS of images whose path is in one; None: the defaults.

    Raises:
        ConfigError: highdicom is not installed, or a file that `pacs` names is unusable.
        InputError: the scores are unfinished, not a score folder, or contain no DICOM image; `replaces` holds no
            document.
        TableError: the score table is damaged, or there are no heat maps.
        OutputError: `out` belongs to other scores, cannot be written, or another command writes there.
    """
    extras.require("highdicom", KIND)
    from ray_cxr.reporting import captures, sr_document

    out = remote.to_path(out)
    folder = sr_studies.read_folder(remote.to_path(scores))
    former_folder = None if replaces is None else remote.to_path(replaces).resolve()
    settings = {
        "kind": KIND,
        "format": sr_document.FORMAT,
        "model_digest": folder.model.digest,
        "scores": folder.settings_digest,
        "replaces": None if former_folder is None else str(former_folder),
    }
    run_folder.check_run(out, settings)
    maps_digest = captures.check(folder) if with_heatmaps else None
    finished = _find_finished(out, folder, maps_digest)
    if finished is not None:
        return finished
    former = read_documents(sorted(former_folder.glob("*.dcm"))) if former_folder else {}
    if former_folder and not former:
        raise InputError(f"--replaces {replaces}: has no document; pass the folder of an earlier `export-sr`")
    if any(path is not None and is_dicomweb(path) for path in folder.scores.paths):
        dicomweb.configure(pacs or PacsSettings())
    with run_folder.lock(out, KIND):
        # Values of headers are copied unchanged, as the PACS has them, even if they are invalid.
        with pydicom.config.disable_value_validation():
            plan = sr_studies.plan_export(folder.scores)
        if not plan.headers and FAILED not in plan.outcomes:
            raise InputError(
                f"{scores}: none of its {len(plan.outcomes):,} rows is a scored DICOM image, and structured reports "
                "refer to DICOM images; score a folder of DICOM files"
            )
        run_folder.create_run(out, settings)
        try:
            run_folder.clear_complete(out)
            return _write_export(out, folder, plan, former, maps_digest)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None


def _find_finished(out: Path, folder: ScoreFolder, maps_digest: str | None) -> Export | None:
    """Return the counts of an earlier run in `out` if it finished with the same scores and heat maps."""
    record = run_folder.read_json(out / "export.json")
    if not run_folder.is_complete(out) or record.get("scores_digest") != folder.digest:
        return None
    if maps_digest not in (None, record.get("heatmaps_digest")):
        return None
    try:
        counts = {name: record[name] for name in ("reports", "partial", "replacing")}
        captured = None if maps_digest is None else Counter(record["heatmaps"])
        return Export(Counter(record["outcomes"]), captures=captured, **counts)
    except (KeyError, TypeError, ValueError):
        return None


def _write_export(
    out: Path, folder: ScoreFolder, plan: ExportPlan, former: _Documents, maps_digest: str | None
) -> Export:
    """Write the documents, then the heat maps if `maps_digest` is set, then the table and the counts."""
    from ray_cxr.reporting import captures

    earlier = _read_earlier_reports(out)
    export = Export(Counter())
    reports: list[str | None] = [None] * len(plan.outcomes)
    former |= read_documents([out / f"{uid}.dcm" for uid in sorted(set(earlier.values()))])
    studies = plan.studies()
    contents = [_add_replaced(content, former) for content in sr_studies.collect_contents(folder, plan)]

    def write(document: tuple[str, bytes] | str) -> tuple[str, bool] | str:
        if isinstance(document, str):
            return document
        return document[0], atomic.write_if_changed(out / f"{document[0]}.dcm", document[1])

    outcomes = remote.map_concurrently(write, _build_documents(contents))
    with Progress("write reports", len(studies), unit="reports") as progress:
        for rows, content, outcome in zip(studies, contents, outcomes, strict=True):
            if isinstance(outcome, str):
                for row in rows:
                    plan.fail(row, f"corrupt: no report can be made with its header ({outcome})")
            else:
                uid, is_new = outcome
                for row in rows:
                    reports[row] = uid
                export.written += is_new
                export.reports += 1
                export.partial += content.missing > 0
                export.replacing += bool(content.replaced)
            progress.advance(1)
    export.outcomes.update(plan.outcomes)
    export.reasons.update(plan.reasons.values())
    # Remove an earlier run's documents of the same images, e.g. of a study whose other images it could not read.
    replaced = {earlier[row] for row, report in enumerate(reports) if report is not None and row in earlier}
    remote.remove_files(out / f"{uid}.dcm" for uid in replaced - set(reports))
    reasons = [plan.reasons.get(row) for row in range(len(reports))]
    columns = {"image_id": folder.scores.ids, "outcome": plan.outcomes, "reason": reasons, "report": reports}
    table = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
    atomic.write_parquet(table, out / "images.parquet")
    record = {
        "rows": len(reports),
        "outcomes": dict(sorted(export.outcomes.items())),
        "reasons": dict(sorted(export.reasons.items())),
        "reports": export.reports,
        "partial": export.partial,
        "replacing": export.replacing,
        "scores_digest": folder.digest,
        "model_digest": folder.model.digest,
    }
    if maps_digest is not None:
        export.captures, export.capture_reasons = captures.write_captures(out, folder, plan)
        record |= {"heatmaps": dict(sorted(export.captures.items())), "heatmaps_digest": maps_digest}
    atomic.write_json(out / "export.json", record)
    if not export.list_failures():
        run_folder.mark_complete(out)
    return export


def _read_earlier_reports(out: Path) -> dict[int, str]:
    """Return the document of each row from an earlier run in `out`."""
    try:
        file = remote.read_file(out / "images.parquet")
        column = pq.read_table(file, columns=["report"])["report"].to_pylist() if file else []
    except (OSError, KeyError, pa.ArrowException):
        return {}
    return {row: report for row, report in enumerate(column) if report and sr_studies.UID_TEXT.fullmatch(report)}


def read_documents(paths: Sequence[Path]) -> _Documents:
    """Return the documents of each study; unreadable files are skipped."""
    found: _Documents = {}
    for document, replaced in filter(None, remote.map_concurrently(_read_document, paths)):
        found.setdefault(document.study, {})[document] = replaced
    return found


def _read_document(path: Path) -> tuple[ImageHeader, tuple[ImageHeader, ...]] | None:
    """Return a document and those that it replaced; None for another file and an unreadable one."""
    tags = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "PredecessorDocumentsSequence"]
    with contextlib.suppress(OSError, InvalidDicomError, AttributeError, KeyError):
        ds = pydicom.dcmread(io.BytesIO(path.read_bytes()), specific_tags=tags)
        if ds.SOPClassUID == ComprehensiveSRStorage:
            study, series, instance, sop_class = (str(ds[tag].value) for tag in tags[:4])
            return ImageHeader(study, series, instance, sop_class), tuple(_list_replaced(ds))
    return None


def _list_replaced(ds: pydicom.Dataset) -> Iterator[ImageHeader]:
    for study in ds.get("PredecessorDocumentsSequence", []):
        for series in study.ReferencedSeriesSequence:
            for item in series.ReferencedSOPSequence:
                uids = (study.StudyInstanceUID, series.SeriesInstanceUID)
                yield ImageHeader(*uids, item.ReferencedSOPInstanceUID, item.ReferencedSOPClassUID)


def _add_replaced(content: ReportContent, former: _Documents) -> ReportContent:
    """Add the study's former documents to a content, unless one of them has this content already."""
    from ray_cxr.reporting.sr_document import derive_uid

    documents = former.get(content.images[0].study, {})
    for document, before in documents.items():
        same = replace(content, replaced=before)
        if derive_uid(same) == document.instance:
            return same
    return replace(content, replaced=tuple(documents))


def _build_documents(contents: Sequence[ReportContent]) -> Iterator[tuple[str, bytes] | str]:
    """Yield the result of `build_document` for each study, from one process per CPU if there are many studies."""
    from ray_cxr.reporting.sr_document import build_document

    if len(contents) < _MIN_PARALLEL:
        yield from map(build_document, contents)
        return
    # Processes, because the work is pure Python. Spawned, because threads of other libraries do not survive a fork.
    pool = ProcessPoolExecutor(
        min(count_cpus(), _MAX_PROCESSES),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # on Ctrl-C the main process ends them
    )
    try:
        for start in range(0, len(contents), _BATCH_REPORTS):
            yield from pool.map(build_document, contents[start : start + _BATCH_REPORTS], chunksize=8)
    except BrokenProcessPool:
        raise RayCxrError(
            "export-sr: a worker process died. The usual cause is too little memory; run the same command again to "
            "continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
