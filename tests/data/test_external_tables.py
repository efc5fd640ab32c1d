"""Label tables of other hospitals: what is mapped, and what stays unlabelled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ray_cxr.data import manifest_builder
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING

CHEXPERT = """\
Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,\
Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices
CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0
CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,1.0,0.0,,,,,,,
CheXpert-v1.0-small/train/patient00002/study2/view2_lateral.jpg,Unknown,87,Lateral,,,,,,,,,,,,,,,1.0
"""
PADCHEST = """\
,ImageID,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,MethodLabel,Labels
0,205366866401_a.png,20140915,205366866401363482361486798914558,839860488694292331637988235,1930.0,F,PA,Physician,['normal']
1,205366866402_b.png,20150101,205366866402363482361486798914558,839860488694292331637988236,1929.0,M,L,Physician,\
"[' hiatal hernia', 'loculated pleural effusion', 'kyphosis']"
2,205366866403_c.png,20150101,205366866403363482361486798914558,839860488694292331637988237,,O,COSTAL,RNN_model,['normal']
3,205366866404_d.png,20150101,205366866404363482361486798914558,839860488694292331637988238,1960.0,M,AP_horizontal,\
Physician,"['unchanged', 'pneumothorax']"
4,205366866405_e.png,20150101,205366866405363482361486798914558,839860488694292331637988239,1960.0,M,PA,Physician,['mass']
5,205366866406_f.png,20150101,205366866406363482361486798914558,839860488694292331637988240,1960.0,M,PA,Physician,
"""
BOXES = """\
image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
aa,No finding,14,R11,,,,
aa,No finding,14,R7,,,,
aa,No finding,14,R10,,,,
bb,Cardiomegaly,3,R10,691.0,1375.0,1653.0,1831.0
bb,Cardiomegaly,3,R9,692.0,1375.0,1653.0,1831.0
bb,Pleural effusion,10,R9,1,1,5,5
bb,Pleural effusion,10,R9,7,7,9,9
bb,Nodule/Mass,8,R8,1,2,3,4
"""
READERS = """\
image_id,rad_id,Atelectasis,Pleural effusion,Pulmonary fibrosis,Nodule/Mass,Pneumonia,No finding
cc,R1,1,0,0,0,1,0
cc,R2,1,0,0,0,0,0
cc,R3,0,0,0,0,0,0
"""
CONSENSUS = """\
image_id,Atelectasis,Pleural effusion,Pulmonary fibrosis,Nodule/Mass,Pneumonia,No finding
dd,0,1,0,0,0,0
ee,0,0,0,0,0,1
"""
#: Positives and negatives of each label in the tables that torchxrayvision brings, in the order of `LABELS`.
COUNTS = {
    "chexpert_train": (
        *((33376, 23226), (27000, 30147), (14783, 41642), (52246, 38646), (86187, 46327), (0, 0), (0, 0), (0, 0)),
        *((0, 0), (0, 0), (0, 0), (0, 0), (6039, 24022), (19448, 65311), (22381, 183519)),
    ),
    "vinbigdata-train": (
        *((62, 14814), (1817, 12700), (121, 14647), (0, 0), (634, 13968), (0, 0), (1017, 13383), (0, 0)),
        *((245, 14387), (0, 0), (0, 0), (882, 13019), (0, 0), (58, 14904), (10606, 4394)),
    ),
    "PADCHEST_chest_x_ray_images_labels_160K_01.02.19": (
        *((2279, 32581), (3746, 31262), (394, 31778), (87, 34413), (1800, 33012), (376, 34171), (214, 34313)),
        *((608, 33944), (4463, 30565), (247, 34248), (830, 33737), (1827, 32981), (1826, 32795), (115, 34390)),
        (12694, 23553),
    ),
}


def read(tmp_path: Path, text: str) -> pd.DataFrame:
    path = tmp_path / "table.csv"
    path.write_text(text)
    return manifest_builder.read_table(str(path)).reset_index(drop=True)


def labelled(row: pd.Series) -> dict[str, int]:
    return {name: int(row[name]) for name in LABELS if not pd.isna(row[name])}


def test_chexpert(tmp_path: Path) -> None:
    table = read(tmp_path, CHEXPERT)
    assert table["image_id"].tolist() == [
        "train/patient00001/study1/view1_frontal.jpg",
        "train/patient00002/study2/view1_frontal.jpg",
        "train/patient00002/study2/view2_lateral.jpg",
    ]
    assert table["patient_id"].tolist() == ["patient00001", "patient00002", "patient00002"]
    assert table["study_id"].nunique() == 2
    assert table["age"].tolist() == [68, 87, 87]
    assert table["sex"].where(table["sex"].notna(), None).tolist() == ["F", "M", None]
    assert table["view"].tolist() == ["AP", "PA", "LATERAL"]
    normal, uncertain, blank = (labelled(row) for _, row in table.iterrows())
    mapped = {"Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Pneumonia", "Pneumothorax"}
    assert normal == {**dict.fromkeys(mapped, 0), NO_FINDING: 1}
    assert uncertain == {"Edema": 1, "Consolidation": 0, NO_FINDING: 0}
    assert blank == {}
    short = read(tmp_path, "Path,Enlarged Cardiomediastinum,Pleural Effusion\ntrain/patient1/study1/a.jpg,,1.0\n")
    assert labelled(short.iloc[0]) == {"Effusion": 1, NO_FINDING: 0}
    with pytest.raises(TableError, match="line 2"):
        read(tmp_path, CHEXPERT.replace("AP,1.0", "AP,2.0"))


def test_padchest(tmp_path: Path) -> None:
    table = read(tmp_path, PADCHEST)
    assert table["patient_id"].iloc[0] == "839860488694292331637988235"
    assert table["study_id"].iloc[1] == "205366866402363482361486798914558"
    assert table["age"].tolist()[:2] == [84, 86]
    assert np.isnan(table["age"].iloc[2])
    assert table["view"].where(table["view"].notna(), None).tolist() == ["PA", "LATERAL", None, "AP", "PA", "PA"]
    rows = [labelled(row) for _, row in table.iterrows()]
    assert rows[0] == {**dict.fromkeys(FINDINGS, 0), NO_FINDING: 1}
    assert {name for name, value in rows[1].items() if value} == {"Hernia", "Effusion"}
    assert len(rows[1]) == 15
    assert rows[2] == rows[5] == {}
    assert rows[3] == {"Pneumothorax": 1, NO_FINDING: 0}
    assert rows[4] == {**dict.fromkeys(set(FINDINGS) - {"Mass"}, 0), NO_FINDING: 0}
    with pytest.raises(TableError, match="Labels"):
        read(tmp_path, PADCHEST.splitlines()[0] + "\n0,a.png,20140915,1,2,1930.0,F,PA,Physician,normal\n")


def test_vindr_readers_vote(tmp_path: Path) -> None:
    normal, sick = (labelled(row) for _, row in read(tmp_path, BOXES).iterrows())
    classes = {"Atelectasis", "Cardiomegaly", "Consolidation", "Effusion", "Fibrosis", "Infiltration", "Pneumothorax"}
    assert normal == {**dict.fromkeys(classes | {"Pleural_Thickening"}, 0), NO_FINDING: 1}
    # One reader of three saw an effusion, two boxes of it; Nodule/Mass is neither a nodule nor a mass.
    assert sick == {
        **dict.fromkeys(classes - {"Effusion"} | {"Pleural_Thickening"}, 0),
        "Cardiomegaly": 1,
        NO_FINDING: 0,
    }
    (row,) = (labelled(row) for _, row in read(tmp_path, READERS).iterrows())
    assert row == {"Atelectasis": 1, "Effusion": 0, "Fibrosis": 0, NO_FINDING: 0}
    one, two = (labelled(row) for _, row in read(tmp_path, CONSENSUS).iterrows())
    assert one == {"Atelectasis": 0, "Effusion": 1, "Fibrosis": 0, "Pneumonia": 0, NO_FINDING: 0}
    assert two[NO_FINDING] == 1


def test_tables_of_several_hospitals_find_their_images(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    names = ("train/patient00001/study1/view1_frontal.jpg", "bb.png", "00000013_000.png")
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), 9).save(tmp_path / "images" / name)
    nih = "Image Index,Finding Labels,Patient ID\n00000013_000.png,No Finding,13\n"
    for name, text in (("nih", nih), ("chexpert", CHEXPERT), ("vindr", BOXES)):
        (tmp_path / f"{name}.csv").write_text(text)
    tables = [tmp_path / f"{name}.csv" for name in ("nih", "chexpert", "vindr")]
    code, _, err = command("manifest", *tables, "--images", tmp_path / "images", "--out", tmp_path / "m.parquet")
    assert code == 0, err
    paths = pd.read_parquet(tmp_path / "m.parquet").set_index("image_id")["path"].dropna()
    assert {image: Path(path).name for image, path in paths.items()} == {
        names[0]: "view1_frontal.jpg",
        "bb": "bb.png",
        names[2]: names[2],
    }


def test_images_are_found_by_folder_and_without_suffix(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("study1/view1_frontal", "study2/view1_frontal"):
        place = tmp_path / f"CheXpert-v1.0/train/patient0000{name[5]}/{name}.jpg"
        place.parent.mkdir(parents=True)
        Image.new("L", (40, 40), 9).save(place)
    (tmp_path / "vin").mkdir()
    Image.new("L", (40, 40), 9).save(tmp_path / "vin/bb.png")
    for text, folder, found in ((CHEXPERT, "CheXpert-v1.0", 2), (BOXES, "vin", 1)):
        (tmp_path / "t.csv").write_text(text)
        out = tmp_path / f"{folder}.parquet"
        code, _, err = command("manifest", tmp_path / "t.csv", "--images", tmp_path / folder, "--out", out)
        assert code == 0, err
        paths = pd.read_parquet(out).set_index("image_id")["path"].dropna()
        assert len(paths) == found
        assert all(image in path for image, path in paths.items())


@pytest.mark.long
@pytest.mark.parametrize("name", COUNTS)
def test_published_tables(name: str) -> None:
    torch = Path(os.environ.get("RAY_CXR_TORCH", Path(__file__).parents[2] / ".torch"))
    path = next(torch.glob(f"lib/python3*/site-packages/torchxrayvision/data/{name}.csv.gz"), None)
    if path is None:
        pytest.skip("torchxrayvision's tables are not at hand; run scripts/services")
    table = manifest_builder.read_table(str(path))
    rows, patients = {"c": (223_414, 64_540), "v": (15_000, 0), "P": (160_861, 67_625)}[name[0]]
    assert (len(table), table["patient_id"].nunique()) == (rows, patients)
    assert table["image_id"].is_unique
    assert tuple(tuple(int((table[label] == value).sum()) for value in (1, 0)) for label in LABELS) == COUNTS[name]
