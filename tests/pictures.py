"""Pictures of the dashboard for the README, from a real run: python tests/pictures.py

Makes imgs/dashboard-light.png, imgs/dashboard-dark.png and imgs/dashboard.gif. It takes two
minutes, since the window is to be full and the candles are to be many.
"""

import contextlib
import io
import time

from benchmark import running
from browser import launched
from conftest import ROOT, Server, wait_until
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
    page.wait_for_selector("#state.live", timeout=60_000)
    page.wait_for_timeout(5000)  # all charts are drawn, and the notice of a start is gone
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


def main():
    with running(Server, "--embedded") as server, launched() as browser:
        time.sleep(WARM_UP)
        wait_until(lambda: server.health()["rows"] == 25_000, 60, "a full window")
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
    for path in sorted(IMAGES.glob("dashboard*")):
        print(f"{path.name}: {path.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
