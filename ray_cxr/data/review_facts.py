"""How labels from readers' verdicts came about, in the metadata of a label table.

Readers who see the model's output tend to follow it, and readers who open flagged images only never see what the model
missed. A table of labels hides both, so `reviews` writes these facts next to them. Each command that uses the labels
repeats them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_cxr.data import manifest
from ray_cxr.errors import TableError

#: Metadata entry of a manifest that `ray-cxr reviews` wrote.
REVIEW_KEY = b"ray_cxr.review"


@dataclass(frozen=True)
class ReviewFacts:
    """Counts of the labels that readers decided; a label is a finding of an image with a value, 0 or 1.

    Attributes:
        rule: how verdicts of several readers were combined.
        readers, images, labels: how many contributed, and how many there are.
        anchored: labels with a verdict that was given while the model's output was visible.
        labels_visible: labels with a verdict that was given while labels of another table were visible.
        images_not_sampled: images with a verdict from a session that showed no random sample.
        samples: the samples that were read, as text.
        flagged_only: findings whose labels are all on images that the model flagged for them.
    """

    rule: str
    readers: int
    images: int
    labels: int
    anchored: int
    labels_visible: int
    images_not_sampled: int
    samples: Sequence[str]
    flagged_only: Sequence[str]

    def to_metadata(self) -> dict[bytes, bytes]:
        return {REVIEW_KEY: json.dumps(asdict(self)).encode()}

    def describe(self) -> list[str]:
        """Return what limits the labels, a sentence each; `[]` for blind verdicts on a random sample."""
        lines = []
        if self.anchored:
            lines.append(
                f"{self.anchored:,} of {self.labels:,} labels were decided while the model's output was visible. "
                "Readers tend to follow it, so results on these labels are too good"
            )
        if self.labels_visible:
            lines.append(f"{self.labels_visible:,} labels were decided while other labels were visible")
        if self.flagged_only:
            lines.append(
                f"every label of {', '.join(self.flagged_only)} is on an image that the model flagged: such labels "
                "give no sensitivity and no AUROC, and bias a calibration"
            )
        if self.images_not_sampled:
            lines.append(
                f"{self.images_not_sampled:,} of {self.images:,} images were chosen by readers, not at random: "
                "sensitivity, prevalence and calibration hold for these images only"
            )
        return [f"labels from readers: {line}" for line in lines]


def read_facts(metadata: Mapping[bytes, bytes] | None) -> ReviewFacts | None:
    """Return the facts in a table's metadata; None for a table that `reviews` did not write."""
    try:
        return ReviewFacts(**json.loads((metadata or {})[REVIEW_KEY]))
    except (KeyError, ValueError, TypeError):
        return None


def read_caveats(path: str | Path) -> list[str]:
    """Return what limits the labels of a table; `[]` for one that `reviews` did not write."""
    try:
        with manifest.open_manifest(path) as file:
            facts = read_facts(file.metadata)
    except TableError:  # a CSV
        return []
    return facts.describe() if facts else []
