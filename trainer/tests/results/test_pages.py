"""What a person looks at, in a real browser: TensorBoard of a real run, and the run's report."""

from __future__ import annotations

import json
import sys
import time
from io import BytesIO
from pathlib import Path

import debian
import numpy as np
import pytest
from patience import patient
from PIL import Image
from runs import REPOSITORY, TINY

from k8scifar.cli import COMMANDS, main
from k8scifar.data.prepare import prepare

sys.path.insert(0, str(REPOSITORY / "trainer" / "tools"))
browser = pytest.importorskip("browser", reason="selenium is missing; make venv installs it")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page():
    """A headless browser; installs Debian's where CI allows it, and skips where there is none."""
    try:
        browser.find()
    except LookupError as error:
        if not debian.may_install():
            pytest.skip(f"{error} (or run as root with K8SCIFAR_INSTALL=1)")
        debian.install("chromium", "chromium-driver")
    with browser.chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def run_folder(module_path: Path) -> Path:
    """The folder of a finished run of 10 steps."""
    prepare(module_path / "data", "synthetic:100:40")
    settings = TINY | {"global_batch": 20, "micro_batch": 10, "log": {"every_steps": 1}}
    (module_path / "tiny.yaml").write_text(json.dumps(settings))
    paths = ("--data-dir", str(module_path / "data"), "--runs-dir", str(module_path / "runs"), "--name", "short")
    assert main(["train", "--config", str(module_path / "tiny.yaml"), *paths]) == 0
    return module_path / "runs" / "short"


def test_tensorboard_shows_the_curves_and_pictures_of_a_run(page, run_folder):
    with browser.tensorboard(run_folder.parent) as address:
        page.get(f"{address}?tagFilter=step%2Floss#timeseries")
        rows = "document.querySelectorAll('scalar-card tb-data-table-content-row').length"  # values: the data are there
        browser.until(page, f"{rows} == 1", patient(60))
        assert page.title == "TensorBoard"
        assert "short" in page.find_element("tag name", "runs-selector").text
        canvas = page.find_element("css selector", "scalar-card line-chart canvas")
        end = time.monotonic() + patient(60)
        while (columns := drawn(canvas)) < 0.5 and time.monotonic() < end:
            time.sleep(0.3)
        assert columns > 0.5
        page.get(f"{address}?tagFilter=test%2Fconfusion#timeseries")
        page.refresh()
        loaded = "[...document.querySelectorAll('image-card img')].find(i => i.complete && i.naturalWidth > 200)"
        assert browser.until(page, loaded, patient(60)).is_displayed()
        assert page.find_element("css selector", "image-card tb-truncated-path").get_attribute("title") == (
            "test/confusion"
        )
        assert browser.complaints(page) == []


def drawn(canvas) -> float:
    """Fraction of a chart's pixel columns that hold the bluish grey of TensorBoard's first curve."""
    with Image.open(BytesIO(canvas.screenshot_as_png)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    curve = (pixels[..., 2] - pixels[..., 0] > 20) & (pixels.max(-1) < 190)
    return float(curve.any(0).mean())


@pytest.mark.skipif("report" not in COMMANDS, reason="this version has no `k8scifar report`")
def test_the_report_is_one_page_with_its_pictures_and_figures(page, run_folder):
    report = run_folder / "report.html"
    if not report.exists():
        assert main(["report", str(run_folder)]) == 0
    page.get(report.as_uri())
    summary = json.loads((run_folder / "summary.json").read_text())
    text = page.find_element("tag name", "body").text
    assert f"{summary['accuracy']:.2%}" in text
    assert all(name in page.page_source for name in summary["per_class"])
    pictures = page.execute_script(
        "return [...document.querySelectorAll('img')].map(i => [i.src.slice(0, 5), i.complete ? i.naturalWidth : 0])"
    )
    drawings = page.execute_script("return document.querySelectorAll('svg path, svg polyline, canvas').length")
    assert all(source == "data:" and width > 0 for source, width in pictures)
    assert len(pictures) + drawings >= 3  # curves, confusion matrix, worst mistakes
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.complaints(page) == []
