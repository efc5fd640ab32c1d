"""What others have published on ChestX-ray14, and whether a figure may stand beside one of ours.

An AUROC is a property of a model and of the images it was tested on. Two of them say something about two models only
where the images and the labels were the same; here that means NIH's official test split, whole, with NIH's labels.
Every other figure is shown with the reason why it says nothing about an evaluation, and nothing is ranked.

Where figures were read: a source names the place, which is mostly not the paper itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ray_cxr.labels import FINDINGS, NO_FINDING

#: Images of NIH's official test split.
OFFICIAL_TEST_IMAGES = 25_596

#: What a published model was tested on: NIH's official test split; a part of it; a split drawn at random by patient;
#: images labelled by radiologists; or what its source does not say.
Tested = Literal["official", "official_part", "patient", "consensus", "unknown"]
#: Whose labels an evaluation is against: NIH's own, mined from reports, or radiologists'.
LabelSource = Literal["nih", "adjudicated", "consensus"]


@dataclass(frozen=True)
class PublishedAuroc:
    """One AUROC as printed, with its 95% interval where one was printed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Published:
    """The figures of one model on one set of images.

    Attributes:
        name: of the model or its authors, with the year.
        source: paper or software, and where the figures were read.
        tested_on: the images and labels, in words.
        tested: the same as a kind; see `Tested`.
        n_images: how many images, or None where the source does not say.
        aurocs: by finding, as far as they were read; empty where only the mean was.
        mean: over the 14 findings as printed, or None.
        mean_to: where the source gives a range of means, its upper end; `mean` is then the lower. None otherwise.
    """

    name: str
    source: str
    tested_on: str
    tested: Tested
    n_images: int | None
    aurocs: Mapping[str, PublishedAuroc] = field(default_factory=lambda: MappingProxyType({}))
    mean: float | None = None
    mean_to: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "name": self.name,
            "source": self.source,
            "tested_on": self.tested_on,
            "tested": self.tested,
            "n_images": self.n_images,
            "aurocs": {
                finding: {"auroc": one.value, "auroc_low": one.low, "auroc_high": one.high}
                for finding, one in self.aurocs.items()
            },
            "mean": self.mean,
            "mean_to": self.mean_to,
        }


def beside(
    split: str | None,
    kind: str | None,
    labels: LabelSource = "nih",
    *,
    n_images: int | None = None,
    findings: Sequence[str] | None = None,
) -> list[tuple[Published, str | None]]:
    """Every published set of figures, those comparable with an evaluation first.

    Args:
        split: the evaluated part, `train`, `val` or `test`; None where all rows were, whatever their split.
        kind: where the split comes from: `official`, `patient`, `given`, or None where that is not known.
        labels: whose labels the evaluation is against.
        n_images: images evaluated; None, which is not comparable with anything, where that is not known.
        findings: those that the evaluation's mean is over; None means all 14. It matters where a source gives a
            mean alone.

    Returns:
        Pairs of a record and why it is not comparable; None for the reason where it is.
    """
    pairs = [(one, _reason(one, split, kind, labels, n_images, findings)) for one in PUBLISHED]
    return sorted(pairs, key=lambda pair: pair[1] is not None)


def _reason(
    one: Published,
    split: str | None,
    kind: str | None,
    labels: LabelSource,
    n_images: int | None,
    findings: Sequence[str] | None,
) -> str | None:
    if one.tested == "unknown":
        return "its source names no split"
    if one.tested == "patient":
        # Also where this one is random too: each draws its own patients.
        return "another split: random by patient" + (", drawn apart from this one" if kind == "patient" else "")
    if one.tested == "consensus":
        if labels == "nih":
            return f"other labels: a radiologist consensus on {_count(one.n_images)} images, not NIH's"
        return f"another consensus: theirs is on {_count(one.n_images)} images of their own choice"
    if one.tested == "official_part":
        return (
            f"a part only of the official test split: {_count(one.n_images)} of {_count(OFFICIAL_TEST_IMAGES)} images"
        )
    return _against_official(labels, split, kind, n_images) or (None if one.aurocs else _other_mean(findings))


def _against_official(labels: LabelSource, split: str | None, kind: str | None, n_images: int | None) -> str | None:
    if labels != "nih":
        return "other labels: NIH's own, not a radiologist consensus"
    if split is None:
        return "another split: this evaluation takes all labelled images, theirs the official test split"
    if kind != "official":
        ours = {"patient": "a random patient split", "given": "a split as the tables gave it"}.get(
            kind or "", "a split of unknown origin"
        )
        return f"another split: this evaluation is of {ours}, theirs of the official test split"
    if split != "test":
        return f"another part: this evaluation is of the {split} images, theirs of the official test split"
    if n_images is None:
        return "how many images of the official test split were evaluated here is not known"
    if n_images != OFFICIAL_TEST_IMAGES:
        return (
            f"this evaluation has {_count(n_images)} images, the official test split {_count(OFFICIAL_TEST_IMAGES)}; "
            "theirs is of the whole"
        )
    return None


def _other_mean(findings: Sequence[str] | None) -> str | None:
    if findings is None:
        return None
    counted = set(findings) - {NO_FINDING}
    if counted == set(FINDINGS):
        return None
    return f"a mean over other findings: theirs is over {len(FINDINGS)}, this one over {len(counted)}"


def _count(n: int | None) -> str:
    return "an unknown number of" if n is None else f"{n:,}"


def _table(values: Mapping[str, float]) -> Mapping[str, PublishedAuroc]:
    return MappingProxyType({finding: PublishedAuroc(values[finding]) for finding in FINDINGS if finding in values})


def _with_intervals(values: Mapping[str, tuple[float, float, float]]) -> Mapping[str, PublishedAuroc]:
    return MappingProxyType({finding: PublishedAuroc(*values[finding]) for finding in FINDINGS if finding in values})


_OFFICIAL = "NIH's official test split, whole, with NIH's labels"
_LISTED = "Xiao et al., WACV 2023; as listed in the README of lambert-x/medical_mae"

#: Every record, oldest first.
PUBLISHED: tuple[Published, ...] = (
    Published(
        name="Wang et al. 2017",
        source="ChestX-ray8, CVPR 2017; as printed in the README of arnoweng/CheXNet",
        tested_on="ChestX-ray14, on a split that the place of reading does not name",
        tested="unknown",
        n_images=None,
        aurocs=_table(
            {
                "Atelectasis": 0.716,
                "Cardiomegaly": 0.807,
                "Effusion": 0.784,
                "Infiltration": 0.609,
                "Mass": 0.706,
                "Nodule": 0.671,
                "Pneumonia": 0.633,
                "Pneumothorax": 0.806,
                "Consolidation": 0.708,
                "Edema": 0.835,
                "Emphysema": 0.815,
                "Fibrosis": 0.769,
                "Pleural_Thickening": 0.708,
                "Hernia": 0.767,
            }
        ),
        mean=0.738,
    ),
    Published(
        name="Yao et al. 2017",
        source="arXiv 1710.10501; as printed in the README of arnoweng/CheXNet",
        tested_on="ChestX-ray14, on a split that the place of reading does not name",
        tested="unknown",
        n_images=None,
        aurocs=_table(
            {
                "Atelectasis": 0.772,
                "Cardiomegaly": 0.904,
                "Effusion": 0.859,
                "Infiltration": 0.695,
                "Mass": 0.792,
                "Nodule": 0.717,
                "Pneumonia": 0.713,
                "Pneumothorax": 0.841,
                "Consolidation": 0.788,
                "Edema": 0.882,
                "Emphysema": 0.829,
                "Fibrosis": 0.767,
                "Pleural_Thickening": 0.765,
                "Hernia": 0.914,
            }
        ),
        mean=0.803,
    ),
    Published(
        name="CheXNet 2017",
        source="Rajpurkar et al., arXiv 1711.05225; as printed in the README of arnoweng/CheXNet",
        tested_on="ChestX-ray14, a random patient split of the authors, with NIH's labels",
        tested="patient",
        n_images=None,
        aurocs=_table(
            {
                "Atelectasis": 0.8094,
                "Cardiomegaly": 0.9248,
                "Effusion": 0.8638,
                "Infiltration": 0.7345,
                "Mass": 0.8676,
                "Nodule": 0.7802,
                "Pneumonia": 0.7680,
                "Pneumothorax": 0.8887,
                "Consolidation": 0.7901,
                "Edema": 0.8878,
                "Emphysema": 0.9371,
                "Fibrosis": 0.8047,
                "Pleural_Thickening": 0.8062,
                "Hernia": 0.9164,
            }
        ),
        mean=0.841,
    ),
    Published(
        name="CheXNeXt 2018",
        source="Rajpurkar et al., PLOS Medicine 2018; eight of its findings",
        tested_on="420 images of ChestX-ray14 with a consensus of radiologists as labels",
        tested="consensus",
        n_images=420,
        aurocs=_with_intervals(
            {
                "Atelectasis": (0.862, 0.825, 0.895),
                "Cardiomegaly": (0.831, 0.790, 0.870),
                "Effusion": (0.901, 0.868, 0.930),
                "Pneumonia": (0.851, 0.781, 0.911),
                "Pneumothorax": (0.944, 0.915, 0.969),
                "Consolidation": (0.893, 0.859, 0.924),
                "Edema": (0.924, 0.886, 0.955),
                "Pleural_Thickening": (0.798, 0.744, 0.849),
            }
        ),
    ),
    Published(
        name="CheXNet retrained by J. Zech",
        source="software reproduce-chexnet, 2018, retrained 2022; as printed in its README",
        tested_on="ChestX-ray14, a random patient split of its author, with NIH's labels",
        tested="patient",
        n_images=22_433,
        aurocs=_table(
            {
                "Atelectasis": 0.8180,
                "Cardiomegaly": 0.9090,
                "Effusion": 0.8827,
                "Infiltration": 0.7156,
                "Mass": 0.8377,
                "Nodule": 0.7756,
                "Pneumonia": 0.7617,
                "Pneumothorax": 0.8776,
                "Consolidation": 0.8002,
                "Edema": 0.8945,
                "Emphysema": 0.9316,
                "Fibrosis": 0.8251,
                "Pleural_Thickening": 0.7889,
                "Hernia": 0.9175,
            }
        ),
        mean=0.838,
    ),
    Published(
        name="The same model of J. Zech, official part",
        source="software reproduce-chexnet, 2018, retrained 2022; figures from this project's notes",
        tested_on="those of its random split's test images that lie in NIH's official test split, with NIH's labels",
        tested="official_part",
        n_images=5_213,
        aurocs=_table(
            {
                "Atelectasis": 0.779,
                "Cardiomegaly": 0.889,
                "Effusion": 0.818,
                "Infiltration": 0.709,
                "Mass": 0.820,
                "Nodule": 0.767,
                "Pneumonia": 0.725,
                "Pneumothorax": 0.883,
                "Consolidation": 0.742,
                "Edema": 0.811,
                "Emphysema": 0.933,
                "Fibrosis": 0.834,
                "Pleural_Thickening": 0.751,
                "Hernia": 0.994,
            }
        ),
        mean=0.818,
    ),
    Published(
        name="DenseNet-121, official split",
        source=_LISTED,
        tested_on=_OFFICIAL,
        tested="official",
        n_images=OFFICIAL_TEST_IMAGES,
        mean=0.822,
    ),
    Published(
        name="ResNet-50, official split",
        source=f"{_LISTED}, for several ways of pre-training",
        tested_on=_OFFICIAL,
        tested="official",
        n_images=OFFICIAL_TEST_IMAGES,
        mean=0.809,
        mean_to=0.815,
    ),
    Published(
        name="ViT-B, official split",
        source=_LISTED,
        tested_on=_OFFICIAL,
        tested="official",
        n_images=OFFICIAL_TEST_IMAGES,
        mean=0.830,
    ),
)
