"""Pictures of the dashboard for the README, from a real run: python tests/pictures.py

Makes imgs/dashboard-light.png, imgs/dashboard-dark.png, imgs/dashboard.gif and imgs/own-table.png.
It takes two minutes, since the window is to be full and the candles are to be many.
"""

import contextlib
import io
import tempfile
import time

from benchmark import running
from browser import launched
from clickhouse_http import ClickHouseProcess
from conftest import ROOT, Database, Server, wait_until
from PIL import Image

IMAGES = ROOT / "imgs"
WARM_UP = 75  # seconds of ticks
FRAMES, PAUSE = 20, 0.25  # five seconds, at the pace of the ticks
WIDTH = 960  # of the animation


@contextlib.contextmanager
def shown(browser, server, width, height, scheme):
    """The dashboard, moving."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        timezone_id="Europe/Zurich",
        locale="en-GB",
    )
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("perspective-viewer:not(.empty)", timeout=60_000)
    page.wait_for_timeout(8000)  # all charts are drawn, and the notice of a start is gone
    yield page
    context.close()


def frames(page):
    """Pictures at an even pace."""
    began = time.monotonic()
    for number in range(FRAMES):
        page.wait_for_timeout(max(0, 1000 * (began + number * PAUSE - time.monotonic())))
        with Image.open(io.BytesIO(page.screenshot())) as picture:
            picture = picture.convert("RGB")
        yield picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.LANCZOS)


# Sensors of a greenhouse: a table of one's own, of which the page draws a dashboard.
SENSORS = """
CREATE TABLE {0}.sensors (time DateTime64(3), sensor LowCardinality(String), room String,
    temperature Float32, humidity Float32) ENGINE = MergeTree ORDER BY time
    SETTINGS enable_block_number_column = 1, enable_block_offset_column = 1;
INSERT INTO {0}.sensors SELECT now64(3) - toIntervalSecond(5 * (9999 - number)) AS time,
    concat('sensor ', toString(number % 6 + 1)),
    ['north', 'south', 'cellar'][intDiv(number, 6) % 3 + 1],
    18 + number % 6 + 3 * sin(number / 700) + rand(1) % 100 / 200,
    60 - intDiv(number, 6) % 3 * 5 + 8 * cos(number / 900) + rand(2) % 100 / 100
    FROM numbers(10000)"""


@contextlib.contextmanager
def own_table():
    """A server that follows a table without rollups."""
    with tempfile.TemporaryDirectory() as folder, ClickHouseProcess(folder) as clickhouse:
        database = Database(clickhouse, "greenhouse")
        database.create_table()
        for command in SENSORS.format(database.name).split(";"):
            database.client.command(command)
        with running(Server, "--dsn", database.dsn, "--table", "sensors") as server:
            yield server


def main():
    with (
        own_table() as server,
        launched() as browser,
        shown(browser, server, 1440, 900, "light") as page,
    ):
        page.screenshot(path=IMAGES / "own-table.png")
    with running(Server, "--embedded") as server, launched() as browser:
        time.sleep(WARM_UP)
        wait_until(lambda: server.health()["rows"] == 25_000, "a full window")
        for scheme in ("light", "dark"):
            with shown(browser, server, 1440, 900, scheme) as page:
                page.screenshot(path=IMAGES / f"dashboard-{scheme}.png")
        with shown(browser, server, 1280, 800, "dark") as page:
            pictures = list(frames(page))
    # One palette for all, without dithering: what does not change takes no room then.
    palette = pictures[0].quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *others = (
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
    )
    first.save(
        IMAGES / "dashboard.gif",
        save_all=True,
        append_images=others,
        duration=round(1000 * PAUSE),
        loop=0,
        optimize=False,
    )
    for path in sorted(IMAGES.glob("*.[gp]*")):
        print(f"{path.name}: {path.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
