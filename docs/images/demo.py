"""Makes demo.png beside this file: the page of `silc demo small` in Chromium.

python docs/images/demo.py          needs silc[dev], and Chromium or Chrome
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from silc import load
from silc.app.demo import Demo
from silc.app.demo_server import Server


def main() -> None:
    server = Server("127.0.0.1", 0, Demo(load("small"), "small").routes())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as play:
        # Chromium's own sandbox cannot be had in a container
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1240, "height": 1080})
        page.goto(server.url)
        page.wait_for_selector("#heats button")
        page.click("#panel-where form button")  # the first answer is slower than those that follow
        page.wait_for_timeout(1000)
        box = page.locator("#view").bounding_box()
        assert box
        page.mouse.move(box["x"] + 0.62 * box["width"], box["y"] + 0.3 * box["height"])
        page.screenshot(path=Path(__file__).with_suffix(".png"))
        chromium.close()


if __name__ == "__main__":
    main()
