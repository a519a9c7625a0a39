"""A headless Chromium that opens a page from a file and says what happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a driver whose logs hold what the console shows and what goes over the network."""
    from selenium import webdriver  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, page: Path, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> None:
    """Open a page in a window of a width in CSS pixels; 390 is a phone's."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.resolve().as_uri())


def requests(driver: Any) -> list[str]:
    """Return the addresses that have been asked for, the page's own included."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def cut_texts(driver: Any) -> list[str]:
    """Return the texts of charts that leave their chart, and of two that lie over each other."""
    return driver.execute_script(
        """
        const found = [];
        for (const svg of document.querySelectorAll("figure svg")) {
          const frame = svg.getBoundingClientRect();
          const elements = [...svg.querySelectorAll("text")];
          const texts = elements.map((text) => [text.textContent, text.getBoundingClientRect()]);
          texts.forEach(([text, box], number) => {
            if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
                box.bottom > frame.bottom + 1) found.push(`${text} leaves its chart`);
            for (const [other, there] of texts.slice(number + 1))
              if (Math.min(box.right, there.right) - Math.max(box.left, there.left) > 1 &&
                  Math.min(box.bottom, there.bottom) - Math.max(box.top, there.top) > 2)
                found.push(`${text} lies over ${other}`);
          });
        }
        return found;
        """
    )
