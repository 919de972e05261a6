"""Headless Chromium for the tests, the benchmark and the pictures."""

import contextlib
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = [
    "--no-sandbox",
    "--use-angle=swiftshader-webgl",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextlib.contextmanager
def launched():
    """This machine's own Chromium, or else the one that Playwright downloads; None if none."""
    names = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        places = [*map(shutil.which, names), playwright.chromium.executable_path]
        path = next((place for place in places if place and Path(place).exists()), None)
        browser = path and playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        if browser:
            browser.close()


def coloured(png):
    """How many pixels have a colour, unlike background, text and lines."""
    with Image.open(io.BytesIO(png)) as image:
        counted = image.convert("RGB").getcolors(1 << 24)
    return sum(count for count, colour in counted if max(colour) - min(colour) > 50)
