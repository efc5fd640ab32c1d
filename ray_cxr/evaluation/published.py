"""Published AUROC and localisation on ChestX-ray14, and whether a published AUROC is comparable with an evaluation.

AUROC depends on the model and on the test images. Two values compare two models only if images and labels are the
same: NIH's official test split, complete, with NIH's labels. All other values are listed with the reason why they are
not comparable, and nothing is ranked.

Each record names where its values were read, which is mostly not the paper itself. A mean that the source does not
print is computed here from its values and marked so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from ray_cxr.labels import FINDINGS, NO_FINDING

#: Images of NIH's official test split.
OFFICIAL_TEST_IMAGES = 25_596

#: Test set of a published model: NIH's official test split, a part of it, a random patient split, images labelled by
#: radiologists, or not stated.
Tested = Literal["official", "official_part", "patient", "consensus", "unknown"]


#: Macro AUROC on validation images and on the official test split of the same model, as model cards on Hugging Face
#: print them.
VALIDATION_AND_TEST: Mapping[str, tuple[float, float]] = {
    "Yzaza/nih-cxr-models, DenseNet121 at 320 pixels": (0.8414, 0.8106),
    "Yzaza/nih-cxr-models, Swin-T at 320 pixels": (0.8395, 0.8184),
    "nessi10/chestxray14-cnn-vs-transformers, DenseNet121": (0.835, 0.805),
    "nessi10/chestxray14-cnn-vs-transformers, DeiT-S": (0.815, 0.785),
    "nessi10/chestxray14-cnn-vs-transformers, Swin-T": (0.832, 0.808),
    "nessi10/chestxray14-cnn-vs-transformers, CoAtNet-0": (0.829, 0.809),
    "grisha1998/chestxray14-official-ensemble, ConvNeXt-S at 384 pixels": (0.8243, 0.8015),
    "grisha1998/chestxray14-official-ensemble, Swin-B at 384 pixels": (0.8219, 0.8069),
}


@dataclass(frozen=True)
class PublishedAuroc:
    """One AUROC as printed, with its 95% interval if one was printed."""

    auroc: float
    auroc_low: float | None = None
    auroc_high: float | None = None


@dataclass(frozen=True)
class Published:
    """Results of one model on one set of images."""

    name: str
    source: str  # paper or software, and where the values were read
    tested_on: str
    tested: Tested
    n_images: int | None = None
    aurocs: Mapping[str, PublishedAuroc] = field(default_factory=dict)  # by finding; empty for a mean only
    mean: float | None = None  # over the 14 findings, or those of the evaluation (see `list_published`)
    mean_to: float | None = None  # upper end if the source gives a range of means
    mean_low: float | None = None  # 95% interval of the mean as printed, from resampled patients
    mean_high: float | None = None
    mean_computed: bool = False  # whether the source prints no mean, so that it was computed from its values

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        return asdict(self)


def describe_gap(kind: str | None, *, synthetic: bool) -> str | None:
    """Return how much higher validation was than test in public results on NIH's official split; None for other splits.

    Args:
        kind: origin of the split, as in `list_published`.
        synthetic: whether the images are phantoms.
    """
    if kind != "official" or synthetic:
        return None
    gaps = sorted(validation - test for validation, test in VALIDATION_AND_TEST.values())
    return (
        f"in {len(gaps)} public results on ChestX-ray14 the macro AUROC on the official test split was "
        f"{gaps[0]:.3f} to {gaps[-1]:.3f} lower than on validation"
    )


def list_published(
    split: str | None, kind: str | None, *, n_images: int, findings: Sequence[str]
) -> list[tuple[Published, str | None]]:
    """Return all records with the reason why each is not comparable with an evaluation against NIH's labels, or None.

    Comparable records come first. The mean of those with values per finding covers the findings of the evaluation.

    Args:
        split: evaluated split, `train`, `val` or `test`; None if all rows were evaluated.
        kind: origin of the split, `official`, `patient` or `given`; None if unknown.
        n_images: number of evaluated images.
        findings: findings that the evaluation's mean covers.
    """
    not_official = _compare_with_official(split, kind, n_images)
    pairs = []
    for record in PUBLISHED:
        reason = _explain_test_set(record, kind) if record.tested != "official" else not_official
        other_findings = _compare_means(findings)
        if reason is None and other_findings is not None and record.aurocs:
            values = [printed.auroc for finding, printed in record.aurocs.items() if finding in findings]
            mean = fmean(values) if values else None
            record = replace(record, mean=mean, mean_to=None, mean_low=None, mean_high=None, mean_computed=True)
        pairs.append((record, reason or (None if record.aurocs else other_findings)))
    return sorted(pairs, key=lambda pair: pair[1] is not None)


def _explain_test_set(record: Published, kind: str | None) -> str:
    """Return why a test set other than the official one is not comparable."""
    if record.tested == "patient":
        return "another split: random by patient" + (", drawn independently of this one" if kind == "patient" else "")
    if record.tested == "consensus":
        return f"other labels: a radiologist consensus on {record.n_images:,} images, not NIH's"
    if record.tested == "official_part":
        return f"only part of the official test split: {record.n_images:,} of {OFFICIAL_TEST_IMAGES:,} images"
    return "its source names no split"


def _compare_with_official(split: str | None, kind: str | None, n_images: int) -> str | None:
    """Return how the evaluated images differ from NIH's whole official test split; None if they do not."""
    if split is None:
        return "another split: this evaluation takes all labelled images, theirs the official test split"
    if kind != "official":
        origins = {"patient": "a random patient split", "given": "a split as the tables gave it"}
        origin = origins.get(kind or "", "a split of unknown origin")
        return f"another split: this evaluation is of {origin}, theirs of the official test split"
    if split != "test":
        return f"another part: this evaluation is of the {split} images, theirs of the official test split"
    if n_images != OFFICIAL_TEST_IMAGES:
        return f"this evaluation has {n_images:,} images; the official test split has {OFFICIAL_TEST_IMAGES:,}"
    return None


def _compare_means(findings: Sequence[str]) -> str | None:
    counted = set(findings) - {NO_FINDING}
    if counted == set(FINDINGS):
        return None
    return f"a mean over other findings: theirs is over {len(FINDINGS)}, this one over {len(counted)}"


_TABLE = """
    Finding              Wang     Yao    CheXNet   Zech   Zech_part   Wang_official
    Atelectasis         0.716    0.772    0.8094   0.8180   0.779   0.7003
    Cardiomegaly        0.807    0.904    0.9248   0.9090   0.889   0.8100
    Consolidation       0.708    0.788    0.7901   0.8002   0.742   0.7032
    Edema               0.835    0.882    0.8878   0.8945   0.811   0.8052
    Effusion            0.784    0.859    0.8638   0.8827   0.818   0.7585
    Emphysema           0.815    0.829    0.9371   0.9316   0.933   0.8330
    Fibrosis            0.769    0.767    0.8047   0.8251   0.834   0.7859
    Hernia              0.767    0.914    0.9164   0.9175   0.994   0.8717
    Infiltration        0.609    0.695    0.7345   0.7156   0.709   0.6614
    Mass                0.706    0.792    0.8676   0.8377   0.820   0.6933
    Nodule              0.671    0.717    0.7802   0.7756   0.767   0.6687
    Pleural_Thickening  0.708    0.765    0.8062   0.7889   0.751   0.6835
    Pneumonia           0.633    0.713    0.7680   0.7617   0.725   0.6580
    Pneumothorax        0.806    0.841    0.8887   0.8776   0.883   0.7993
"""
_FINDINGS, *_COLUMNS = zip(*(line.split() for line in _TABLE.strip().splitlines()), strict=True)
#: AUROC by the heading of a column, and by finding.
_AUROCS = {
    name: {finding: PublishedAuroc(float(value)) for finding, value in zip(_FINDINGS[1:], values, strict=True)}
    for name, *values in _COLUMNS
}
_MEANS = {name: fmean(printed.auroc for printed in aurocs.values()) for name, aurocs in _AUROCS.items()}
_CONSENSUS = {
    "Atelectasis": PublishedAuroc(0.862, 0.825, 0.895),
    "Cardiomegaly": PublishedAuroc(0.831, 0.790, 0.870),
    "Consolidation": PublishedAuroc(0.893, 0.859, 0.924),
    "Edema": PublishedAuroc(0.924, 0.886, 0.955),
    "Effusion": PublishedAuroc(0.901, 0.868, 0.930),
    "Pleural_Thickening": PublishedAuroc(0.798, 0.744, 0.849),
    "Pneumonia": PublishedAuroc(0.851, 0.781, 0.911),
    "Pneumothorax": PublishedAuroc(0.944, 0.915, 0.969),
}
_OFFICIAL = "NIH's official test split, complete, with NIH's labels"
_UNNAMED = "ChestX-ray14, on a split that this source does not name"
_LISTED = "Xiao et al., WACV 2023, arXiv 2210.12843; as listed in the README of lambert-x/medical_mae"
_CARD = "on Hugging Face; as read in the model card"
_YZAZA = f"nih-cxr-models {_CARD}"


def _official(name: str, source: str, **values: Any) -> Published:
    return Published(name, source, _OFFICIAL, "official", OFFICIAL_TEST_IMAGES, **values)


#: Every record, oldest first.
PUBLISHED: tuple[Published, ...] = (
    Published(
        "Wang et al. 2017",
        "ChestX-ray8, CVPR 2017; as printed in the README of arnoweng/CheXNet",
        _UNNAMED,
        "unknown",
        aurocs=_AUROCS["Wang"],
        mean=_MEANS["Wang"],
        mean_computed=True,
    ),
    _official(
        "Wang et al. 2017, official split",
        "ChestX-ray8, arXiv 1705.02315, table 17 of its later version: ResNet-50",
        aurocs=_AUROCS["Wang_official"],
        mean=_MEANS["Wang_official"],
        mean_computed=True,
    ),
    Published(
        "Yao et al. 2017",
        "arXiv 1710.10501; as printed in the README of arnoweng/CheXNet",
        _UNNAMED,
        "unknown",
        aurocs=_AUROCS["Yao"],
        mean=_MEANS["Yao"],
        mean_computed=True,
    ),
    Published(
        "CheXNet 2017",
        "Rajpurkar et al., arXiv 1711.05225; as printed in the README of arnoweng/CheXNet",
        "ChestX-ray14, the authors' random patient split, with NIH's labels",
        "patient",
        aurocs=_AUROCS["CheXNet"],
        mean=0.841,
    ),
    Published(
        "CheXNeXt 2018",
        "Rajpurkar et al., PLOS Medicine 2018; eight of its findings",
        "420 images of ChestX-ray14 with a consensus of radiologists as labels",
        "consensus",
        n_images=420,
        aurocs=_CONSENSUS,
    ),
    Published(
        "CheXNet retrained by J. Zech",
        "software reproduce-chexnet, 2018, retrained 2022; as printed in its README",
        "ChestX-ray14, its author's random patient split, with NIH's labels",
        "patient",
        n_images=22_433,
        aurocs=_AUROCS["Zech"],
        mean=_MEANS["Zech"],
        mean_computed=True,
    ),
    Published(
        "The same model of J. Zech, official part",
        "software reproduce-chexnet, 2018, retrained 2022; values from this project's notes",
        "the test images of its random split that are also in NIH's official test split, with NIH's labels",
        "official_part",
        n_images=5_213,
        aurocs=_AUROCS["Zech_part"],
        mean=_MEANS["Zech_part"],
        mean_computed=True,
    ),
    _official(
        "DenseNet-121, official split",
        f"{_LISTED}: 0.822 from ImageNet weights, 0.806 from MoCo v2 and 0.812 from MAE on radiographs",
        mean=0.806,
        mean_to=0.822,
    ),
    _official(
        "ResNet-50, official split",
        f"{_LISTED}, from ImageNet weights by MoCo v2, BYOL and SwAV",
        mean=0.809,
        mean_to=0.815,
    ),
    _official("ViT-B, official split", _LISTED, mean=0.830),
    _official(
        "Ensemble of grisha1998, 384 and 512 px",
        f"chestxray14-official-ensemble {_CARD}: ConvNeXt-S, Swin-B and DenseNet-121",
        mean=0.8222,
    ),
    _official("DenseNet-121 of Yzaza, 320 px", _YZAZA, mean=0.8106, mean_low=0.8036, mean_high=0.8167),
    _official("Swin-T of Yzaza, 320 px", _YZAZA, mean=0.8184, mean_low=0.8127, mean_high=0.8236),
    _official(
        "DenseNet-121 of nessi10",
        f"chestxray14-cnn-vs-transformers {_CARD}; 200 resamples of patients",
        mean=0.805,
        mean_low=0.799,
        mean_high=0.811,
    ),
)

# Wang et al. 2017, arXiv 1705.02315, tables 4 (T(IoBB)) and 7 (T(IoU)): share of a finding's boxes found.
_WANG_BOXES = """
    T         Atelectasis Cardiomegaly Effusion Infiltration Mass    Nodule  Pneumonia  Pneumothorax
    iobb 0.1  0.7277      0.9931       0.7124   0.7886       0.4352  0.1645  0.7500     0.4591
    iobb 0.25 0.5500      0.9794       0.5424   0.5772       0.2823  0.0506  0.5583     0.3469
    iobb 0.5  0.2833      0.8767       0.3333   0.4227       0.1411  0.0126  0.3833     0.1836
    iobb 0.75 0.1666      0.7260       0.2418   0.3252       0.1176  0.0126  0.2583     0.1020
    iobb 0.9  0.1333      0.6849       0.2091   0.2520       0.0588  0.0126  0.2416     0.0816
    iou 0.1   0.6888      0.9383       0.6601   0.7073       0.4000  0.1392  0.6333     0.3775
    iou 0.2   0.4722      0.6849       0.4509   0.4796       0.2588  0.0506  0.3500     0.2346
    iou 0.3   0.2444      0.4589       0.3006   0.2764       0.1529  0.0379  0.1666     0.1326
    iou 0.4   0.0944      0.2808       0.2026   0.1219       0.0705  0.0126  0.0750     0.0714
    iou 0.5   0.0500      0.1780       0.1111   0.0650       0.0117  0.0126  0.0333     0.0306
    iou 0.6   0.0222      0.0753       0.0457   0.0243       0.0000  0.0126  0.0166     0.0306
    iou 0.7   0.0055      0.0273       0.0196   0.0000       0.0000  0.0000  0.0083     0.0204
"""
#: Accuracy of localisation of Wang et al. by measure (`iobb`, `iou`), finding and threshold.
WANG_BOX_ACCURACY: dict[str, dict[str, dict[str, float]]] = {"iobb": {}, "iou": {}}
(_, *_FOUND), *_ROWS = (line.split() for line in _WANG_BOXES.strip().splitlines())
for _measure, _threshold, *_shares in _ROWS:
    for _finding, _share in zip(_FOUND, _shares, strict=True):
        WANG_BOX_ACCURACY[_measure].setdefault(_finding, {})[_threshold] = float(_share)
