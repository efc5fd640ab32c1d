"""A reader with a keyboard, in Chromium. `scripts/services browser` installs it; the tests are skipped without it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from score_archive import Archive, add_heatmaps

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs Chromium: scripts/services browser",
    ),
]
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
#: Milliseconds from an event to the frame after the one that shows it.
_MEASURE = """
const [events, done] = [arguments[0], arguments[1]];
const times = [];
(function next(n) {
  if (n === events.length) return done(times);
  const start = performance.now();
  const [kind, init] = events[n];
  const event = kind === "wheel" ? new WheelEvent(kind, init) : new KeyboardEvent(kind, init);
  document.getElementById("stage").dispatchEvent(event);
  requestAnimationFrame(() => requestAnimationFrame(() => { times.push(performance.now() - start); next(n + 1); }));
})(0);
"""


class Server:
    """The command `ray-cxr review` as a process."""

    def __init__(self, scores: Path, *options: str, port: int | None = None) -> None:
        command = [sys.executable, "-u", "-m", "ray_cxr", "review", str(scores), "--reader", "anna", *options]
        command += [] if port is None else ["--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        lines: list[str] = []
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/\S+", "".join(lines[-1:]))) is None:
            lines.append(self.process.stdout.readline())
            assert lines[-1], "".join(lines)
        self.address, self.port = found[0], int(found[1])
        self.root = f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    archive = Archive(tmp_path, patients=12)
    rng = np.random.default_rng(0)
    for path in archive.paths[:33]:
        pixels = np.kron(rng.integers(60, 200, (25, 20), dtype=np.uint8), np.ones((100, 100), np.uint8))
        Image.fromarray(pixels).save(path, compress_level=1)
    archive.p["Effusion"][[4, 8]] = 0.5
    folder = archive.scores()
    add_heatmaps(folder, archive, np.array([4, 8]), {4})
    return Path(folder)


@pytest.fixture
def start(scores: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*options: str, **named: Any) -> Server:
        started.append(Server(scores, *options, **named))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*_FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1440,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def press(browser: Any, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def wait(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)
    return found


def text(browser: Any, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0])?.textContent ?? ''", name))


def is_drawn(browser: Any) -> bool:
    return bool(browser.execute_script("return Boolean(document.getElementById('image')?.style.transform)"))


def open_study(browser: Any, address: str) -> None:
    browser.get(address)
    wait(lambda: is_drawn(browser))


def check_quiet(browser: Any, root: str) -> None:
    """No error in the console, and no request to another host."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    names = browser.execute_script("return performance.getEntries().map((entry) => entry.name)")
    assert [name for name in names if "://" in name and not name.removeprefix("blob:").startswith(root)] == []


def read_records(scores: Path) -> list[dict[str, Any]]:
    lines = [line for path in (scores / "reviews").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_reader_goes_through_ten_studies_by_keyboard(browser: Any, start: Any, scores: Path) -> None:
    server = start()
    browser.get(server.address)
    check_quiet(browser, server.root)
    open_study(browser, f"{server.root}/study/1")
    for number in range(1, 11):
        press(browser, "1", "a", "2", "d", "3", "u")
        if number == 10:
            break
        press(browser, "j")
        wait(lambda number=number: browser.current_url.endswith(f"/study/{number + 1}") and is_drawn(browser))
        check_quiet(browser, server.root)
    wait(lambda: re.match(r"saved \d\d:\d\d", text(browser, "saved")))
    records = read_records(scores)
    assert len(records) == 30
    assert len({record["study_id"] or record["image_id"] for record in records}) == 10
    assert sorted({record["finding"] for record in records}) == ["Cardiomegaly", "Effusion", "Hernia"]
    press(browser, "z")
    wait(lambda: read_records(scores)[-1:] and len(read_records(scores)) == 31)
    press(browser, "k")
    wait(lambda: browser.current_url.endswith("/study/9"))
    check_quiet(browser, server.root)


def test_heat_map_zoom_and_contrast(browser: Any, start: Any) -> None:
    server = start()
    browser.get(server.address)
    browser.get(f"{server.root}/?q=00000001_001")  # the fifth image has a map of Effusion
    browser.find_element("css selector", ".studies .id").click()
    browser.get(f"{browser.current_url}&image=4")
    wait(lambda: is_drawn(browser))

    def is_shown() -> bool:
        return bool(browser.execute_script("return !document.getElementById('heat').hidden"))

    assert not is_shown()
    names = [row.get_attribute("data-finding") for row in browser.find_elements("css selector", "#findings tbody tr")]
    press(browser, str(names.index("Effusion") + 1), "h")
    wait(is_shown)
    edges = "return ['image', 'heat'].map((id) => JSON.stringify(document.getElementById(id).getBoundingClientRect()))"
    assert len(set(browser.execute_script(edges))) == 1
    press(browser, "+", "h")
    assert not is_shown()
    kinds = [["wheel", {"deltaY": 120 * (-1) ** (n // 5), "bubbles": True, "cancelable": True}] for n in range(10)]
    kinds += [["keydown", {"key": key, "bubbles": True}] for key in "+-i+-i0i+0"]
    times = browser.execute_async_script(_MEASURE, kinds)
    gray = """document.getElementById('contrast').value = 40;
      document.getElementById('contrast').dispatchEvent(new Event('input')); arguments[0](0)"""
    browser.execute_async_script(gray)
    slope = "return Number(document.querySelector('#window feFuncR').getAttribute('slope'))"
    wait(lambda: 1.7 < browser.execute_script(slope) < 1.8)
    assert np.median(times) < 100
    check_quiet(browser, server.root)


def test_verdicts_are_visible_next_to_labels(browser: Any, start: Any, tmp_path: Path) -> None:
    server = start("--manifest", Archive(tmp_path / "labels", patients=12).labels())
    browser.get(server.address)
    fits = "const e = document.getElementById(arguments[0]); return e.scrollWidth <= e.clientWidth"
    for width, height in ((1440, 760), (1024, 768), (390, 844)):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        open_study(browser, f"{server.root}/study/1")
        press(browser, "l", "1", "a", "2", "d", "3", "u")
        assert [name for name in ("panel", "main") if not browser.execute_script(fits, name)] == []
        assert "unsure" in text(browser, "given")


def test_arrows_go_around_the_images_and_no_key_decides_on_the_image_that_was_left(
    browser: Any, start: Any, scores: Path
) -> None:
    server = start()
    browser.get(server.address)
    browser.get(f"{server.root}/?q=00000001_001")
    browser.find_element("css selector", ".studies .id").click()
    wait(lambda: browser.find_elements("id", "which"))
    shown = []
    for _ in range(3):
        name = text(browser, "which").split("Flag")[0].strip()
        shown.append(name)
        # Both keys in one turn: the page has not left yet.
        keys = """for (const key of ["ArrowRight", "1", "a"])
          document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))"""
        browser.execute_script(keys)
        wait(lambda name=name: text(browser, "which") and not text(browser, "which").strip().startswith(name))
    assert shown[0] == shown[2] != shown[1]
    assert read_records(scores) == []


def test_killed_server_loses_no_verdict_that_the_page_showed_as_saved(browser: Any, start: Any, scores: Path) -> None:
    server = start()
    browser.get(server.address)
    open_study(browser, f"{server.root}/study/1")
    press(browser, "1", "a")
    wait(lambda: text(browser, "saved").startswith("saved"))
    server.stop(signal.SIGKILL)
    assert len(read_records(scores)) == 1
    press(browser, "2", "d", "j")
    wait(lambda: "not saved" in text(browser, "failed"))
    assert browser.current_url.endswith("/study/1")
    assert len(read_records(scores)) == 1
    again = start(port=server.port)
    assert again.port == server.port
    # Cookies belong to the browser: a second tab renews the session, and the page sends what it kept.
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(again.address)
    browser.close()
    browser.switch_to.window(first)
    wait(lambda: len(read_records(scores)) == 2)
    wait(lambda: browser.current_url.endswith("/study/2"))
    assert {record["verdict"] for record in read_records(scores)} == {"agree", "disagree"}


def test_blind_reader_sees_the_model_after_the_last_decision(browser: Any, start: Any, scores: Path) -> None:
    server = start("--blind")
    browser.get(server.address)
    # In the random order, the first study may be one that could not be read.
    browser.find_element("css selector", ".studies li:has(img) .id").click()
    wait(lambda: is_drawn(browser))
    assert browser.find_elements("css selector", ".bar") == []
    press(browser, "1", "a", "r")
    wait(lambda: browser.find_elements("css selector", ".bar"))
    records = read_records(scores)
    assert [record["present"] for record in records] == [1, 0, 0]
    assert all(record["blind"] for record in records)
