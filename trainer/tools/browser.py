"""A headless Chromium, driven through ChromeDriver, and a TensorBoard to look at: for the screenshot and the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from k8scifar.launch import sockets

# Without the middle ones it calls its maker's servers at every start, which a test should not depend on.
FLAGS = (
    *("--headless=new", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    "--disable-dev-shm-usage",  # /dev/shm is small in many containers
)


def find() -> tuple[str, str]:
    """Paths of Chromium (or Chrome) and its ChromeDriver. Raises LookupError where one of them is missing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        raise LookupError("no chromium and chromedriver on PATH; on Debian: apt-get install chromium chromium-driver")
    return browser, driver


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile and a page of that size, pixels. Raises LookupError."""
    browser, driver = find()
    options = Options()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="k8scifar-browser-", ignore_cleanup_errors=True) as profile:
        root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        for flag in (*FLAGS, *root, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        started = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield started
        finally:
            started.quit()


def until(page: webdriver.Chrome, script: str, seconds: float = 60.0) -> Any:
    """What a JavaScript expression gives as soon as that is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (value := page.execute_script(f"return {script}")):
        if time.monotonic() > end:
            raise TimeoutError(f"still not true after {seconds:.0f} s in {page.current_url}: {script}")
        time.sleep(0.2)
    return value


def settled(page: webdriver.Chrome, seconds: float = 60.0) -> bytes:
    """A PNG of the page, once two in a row are the same: charts are drawn late. Raises TimeoutError."""
    end, before = time.monotonic() + seconds, b""
    while (now := page.get_screenshot_as_png()) != before:
        if time.monotonic() > end:
            raise TimeoutError(f"{page.current_url} still moves after {seconds:.0f} s")
        before = now
        time.sleep(1.0)
    return now


def complaints(page: webdriver.Chrome) -> list[str]:
    """Errors on the page's console since the last call."""
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def tensorboard(folder: Path, seconds: float = 60.0) -> Iterator[str]:
    """TensorBoard for the runs in `folder`; gives its address once it answers. Raises TimeoutError."""
    port = sockets.free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host=127.0.0.1", f"--port={port}"]
    address = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + seconds
            while not _answers(address):
                if server.poll() is not None:
                    raise TimeoutError(f"TensorBoard ended with exit code {server.returncode}; try {' '.join(command)}")
                if time.monotonic() > end:
                    raise TimeoutError(f"TensorBoard did not answer at {address} within {seconds:.0f} s")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False
