"""Images, heat maps and the page of a study, as a browser receives them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
from dicomweb_server import DicomwebServer
from PIL import Image
from review_browser import Browser
from score_archive import Archive, add_heatmaps, write_boxes
from sr_site import write_image

from ray_cxr.config import PacsSettings
from ray_cxr.errors import ERROR_CODES, InputError
from ray_cxr.imaging.decode import decode
from ray_cxr.imaging.sandbox import Failure
from ray_cxr.review.images import ImageStore
from ray_cxr.review.words import describe_code
from ray_cxr.storage.dicomweb import configure

OpenPage = Callable[..., Browser]


def test_images_arrive_with_the_pixels_of_the_file_and_nothing_else(open_page: OpenPage, archive: Archive) -> None:
    page = open_page()
    row = page.review.index.ids.to_pylist().index(archive.ids[4])
    answer = page.get(f"/image/{row}")
    found = Image.open(io.BytesIO(answer.content))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(Image.open(archive.paths[4])))
    assert found.info == {}
    assert answer.headers["cache-control"] == "no-store"
    small = Image.open(io.BytesIO(page.get(f"/thumb/{row}").content))
    assert (small.format, max(small.size)) == ("JPEG", 96)
    missing = page.get(f"/image/{row + 1}")
    assert (missing.status_code, missing.json()["code"]) == (404, "missing")
    assert str(archive.root) not in missing.text
    small = page.get(f"/thumb/{row + 1}")
    assert (small.status_code, small.headers["content-type"]) == (200, "image/svg+xml")
    assert "file not" in small.text
    assert [page.get(f"/{kind}/{len(archive.ids)}").status_code for kind in ("image", "thumb")] == [404, 404]


def test_error_row_of_an_unreadable_image_is_shown(open_page: OpenPage) -> None:
    page = open_page()
    index = page.review.index
    row = int(np.flatnonzero(~index.ok)[0])
    code, message = index.categories["code"].get(row), index.errors[row].as_py() or ""
    assert page.get(f"/image/{row}").json() == {"code": code, "error": message}
    text = page.get(f"/study/{index.study_of[row] + 1}?image={row}").text
    assert describe_code(str(code)) in text
    assert f'src="/image/{row}"' not in text


def test_heat_maps_cover_the_image_and_are_hidden_from_blind_readers(open_page: OpenPage, archive: Archive) -> None:
    archive.p["Effusion"][[4, 8]] = 0.5  # the probability in those maps
    add_heatmaps(archive.scores(), archive, np.array([4, 8]), {4})
    page, blind = open_page(), open_page(is_blind=True)
    found = {}
    for finding in archive.diseases:
        answer = page.get(f"/heatmap/4/{finding}")
        found[finding] = answer.headers["content-type"]
        if found[finding] == "image/png":
            pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
            assert pixels.shape[2] == 4
            height, width = np.asarray(Image.open(archive.paths[4])).shape
            assert pixels.shape[1] / pixels.shape[0] == pytest.approx(width / height, abs=0.01)
            assert pixels[..., 3].max() > 100 > pixels[..., 3].min()
    assert "image/png" in found.values()
    assert page.get("/heatmap/12/Effusion").json()["error"]
    row = blind.review.index.ids.to_pylist().index(archive.ids[4])
    drawn = next(finding for finding, kind in found.items() if kind == "image/png")
    assert blind.get(f"/heatmap/{row}/{drawn}").status_code == 403
    blind.decide(row, finding=None, present=0)
    assert blind.get(f"/heatmap/{row}/{drawn}").status_code == 200


def test_following_the_list_keeps_its_filter(open_page: OpenPage) -> None:
    page = open_page()
    numbers = [
        int(n) for n in re.findall(r'class="id" href="/study/(\d+)', page.get("/?flag=yes&finding=Effusion").text)
    ]
    text = page.get(f"/study/{numbers[1]}?flag=yes&finding=Effusion").text
    links = {key: re.search(rf'id="{key}" href="/study/(\d+)\?finding=Effusion&amp;flag=yes"', text) for key in "jk"}
    assert {key: int(link[1]) for key, link in links.items() if link} == {"j": numbers[2], "k": numbers[0]}
    # A study that left the list because it was decided keeps its place.
    unread = [int(n) for n in re.findall(r'class="id" href="/study/(\d+)', page.get("/?reviewed=no").text)]
    for row in page.review.index.rows_of[unread[1] - 1]:
        page.decide(row, finding=None, present=0)
    text = page.get(f"/study/{unread[1]}?reviewed=no").text
    assert re.search(rf'id="j" href="/study/{unread[2]}\?', text)
    assert re.search(rf'id="k" href="/study/{unread[0]}\?', text)


def test_pages_hold_no_inline_code_and_name_no_other_host(open_page: OpenPage) -> None:
    page = open_page()
    for text in (page.get("/").text, page.get("/study/1").text, page.get("/static/review.css").text):
        assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?! src=)|https?:", text)
        assert page.get("/static/..%2fapp.py").status_code == 404
    assert page.get("/static/review.js").headers["content-type"].startswith("text/javascript")


def test_boxes_are_fractions_of_their_image(open_page: OpenPage, archive: Archive) -> None:
    path = write_boxes(archive.root / "boxes.csv", [[archive.ids[4], "Effusion", 256, 512, 128, 64]])
    page = open_page(boxes=path)
    text = page.get(f"/study/{page.review.index.study_of[4] + 1}?image=4").text
    assert '<rect x="0.25" y="0.5" width="0.125" height="0.0625"><title>Effusion' in text
    other = page.get(f"/study/{page.review.index.study_of[8] + 1}?image=8").text
    assert "<title>Effusion" not in other
    unknown = write_boxes(archive.root / "unknown.csv", [["other.png", "Effusion", 1, 1, 1, 1]])
    with pytest.raises(InputError, match="has no image of"):
        open_page(boxes=unknown)


def test_images_of_a_pacs_are_fetched_with_the_credentials(open_page: OpenPage, archive: Archive) -> None:
    token = archive.root / "token"
    token.write_text("secret-1\n")
    token.chmod(0o600)
    pixels = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "SamplesPerPixel": 1, "PixelRepresentation": 0}
    header = write_image(archive.root / "image.dcm", 1, 1, PhotometricInterpretation="MONOCHROME2", **pixels)
    data = header.read_bytes() + np.random.default_rng(0).bytes(2 * 64 * 64)
    with DicomwebServer(token="secret-1") as pacs:
        archive.paths[0] = pacs.add(data)
        archive.scores()
        page = open_page(pacs=PacsSettings(host=f"127.0.0.1:{pacs.port}", token_file=str(token)))
        answer = page.get("/image/0")
    configure(PacsSettings())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), decode(data))


def test_every_error_code_has_words() -> None:
    assert [code for code in ERROR_CODES if describe_code(code) == code] == []


def test_cache_is_bounded_and_prefetch_decodes_once(archive: Archive) -> None:
    loads: list[int] = []

    def find(row: int) -> str:
        loads.append(row)
        return archive.paths[row]

    broken = Failure("corrupt", "", None)
    store = ImageStore(find, lambda row: broken if row == 4 else None, {}, cache_bytes=1)
    store.prefetch([4, 0])
    assert isinstance(store.get_image(0), bytes)
    assert store.get_image(4) is broken
    assert loads == [0]
    for row in (0, 8, 8, 0):
        store.get_image(row)
    assert loads == [0, 8, 0]
