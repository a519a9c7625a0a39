"""Reports in a real browser. Debian: apt-get install chromium chromium-driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, insertion, run

from bn_insert.report import runs_report, write_report
from support.browser import BROWSER, DRIVER, browser, cut_texts, requests, show

# Chromium takes seconds to start: the tests share one.
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver installed")

CHARTS = {"insertion": 6, "hostile": 6, "run": 3, "runs": 5}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    hostile = insertion(name=HOSTILE)
    hostile["layers"][0]["name"] = HOSTILE
    reports = {
        "insertion": insertion(),
        "hostile": hostile,
        "run": runs_report([run("plain")]),
        "runs": runs_report([run("plain"), run(HOSTILE, (0.1, 0.9), lr=0.1)]),
    }
    folder = tmp_path_factory.mktemp("pages <b> #1")
    for name, data in reports.items():
        write_report(folder / f"{name}.html", data)
    return {name: folder / f"{name}.html" for name in reports}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    pytest.importorskip("selenium")
    with browser() as driver:
        yield driver


@pytest.mark.parametrize("kind", CHARTS)
def test_a_page_opens_without_a_message_or_a_request(chromium: Any, pages: dict[str, Path], kind: str) -> None:
    requests(chromium)  # those of the page before
    show(chromium, pages[kind])
    assert chromium.get_log("browser") == []
    assert requests(chromium) == [pages[kind].resolve().as_uri()]


@pytest.mark.parametrize("kind", CHARTS)
@pytest.mark.parametrize("width", [1280, 390])
def test_charts_are_there_and_nothing_overlaps_or_is_cut(
    chromium: Any, pages: dict[str, Path], kind: str, width: int
) -> None:
    show(chromium, pages[kind], width)
    sizes = chromium.execute_script(
        "return [...document.querySelectorAll('figure svg')].map((svg) => [svg.clientWidth, svg.clientHeight])"
    )
    assert len(sizes) == CHARTS[kind]
    assert all(300 < chart <= width and height > 100 for chart, height in sizes), sizes
    assert cut_texts(chromium) == []
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    heights = chromium.execute_script(
        "return [...document.querySelectorAll('svg text')].map((text) => text.getBoundingClientRect().height)"
    )
    assert min(heights) >= 9  # pixels of a line, so that it can be read on a phone


def test_the_look_at_cut_texts_sees_one(chromium: Any, pages: dict[str, Path]) -> None:
    show(chromium, pages["run"])
    chromium.execute_script("document.querySelector('figure svg text').setAttribute('transform', 'translate(-30 20)')")
    assert any("leaves its chart" in found for found in cut_texts(chromium))
    chromium.execute_script(
        "const text = document.querySelectorAll('figure svg text')[2]; text.parentNode.append(text.cloneNode(true))"
    )
    assert any("lies over" in found for found in cut_texts(chromium))


def test_a_chart_has_the_colours_of_the_page_light_or_dark(chromium: Any, pages: dict[str, Path]) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        show(chromium, pages["insertion"], scheme=scheme)
        colours[scheme] = chromium.execute_script(
            """
            const style = (selector) => getComputedStyle(document.querySelector(selector));
            return [style("body").backgroundColor, style("body").color, style("figure svg text").fill];
            """
        )
        assert colours[scheme][1] == colours[scheme][2]
    assert colours["light"][0] == "rgb(255, 255, 255)"
    assert len({*colours["light"], *colours["dark"]}) == 4


def column(driver: Any, heading: str) -> list[str]:
    """Return the cells below a heading of the table of sites."""
    return driver.execute_script(
        """
        for (const table of document.querySelectorAll("[aria-label='Inserted layers'] table")) {
          const number = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === arguments[0]);
          return [...table.tBodies[0].rows].map((row) => row.cells[number].textContent.trim());
        }
        """,
        heading,
    )


def test_tables_sort_by_click_and_by_keyboard(chromium: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By  # noqa: PLC0415
    from selenium.webdriver.common.keys import Keys  # noqa: PLC0415

    show(chromium, pages["insertion"])
    buttons = chromium.find_elements(By.CSS_SELECTOR, "[aria-label='Inserted layers'] th button")
    named = {button.text.strip(): button for button in buttons}
    before = column(chromium, "layer")
    values = [float(text) for text in column(chromium, "std max")]
    assert values != sorted(values)
    assert values != sorted(values, reverse=True)
    named["std max"].click()
    assert [float(text) for text in column(chromium, "std max")] == sorted(values)
    assert named["std max"].find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    named["std max"].send_keys(Keys.ENTER)
    assert [float(text) for text in column(chromium, "std max")] == sorted(values, reverse=True)
    named["layer"].send_keys(Keys.SPACE)
    assert sorted(column(chromium, "layer")) == sorted(before)
    assert column(chromium, "layer") != before  # dense layers are called classifier, and come first
    sorted_headings = chromium.find_elements(By.CSS_SELECTOR, "[aria-label='Inserted layers'] [aria-sort]")
    assert [heading.text.split("\N{NO-BREAK SPACE}")[0].strip() for heading in sorted_headings] == ["layer"]


def test_layers_sort_by_the_numbers_in_their_names(chromium: Any, pages: dict[str, Path]) -> None:
    show(chromium, pages["insertion"])
    names = ["features.10", "features.2", "classifier.1"]
    found = chromium.execute_script("return arguments[0].sort(compare)", names)
    assert found == ["classifier.1", "features.2", "features.10"]
    assert chromium.execute_script("return ['10%', '', '9.5%', '1e-05'].sort(compare)") == [
        "1e-05",
        "9.5%",
        "10%",
        "",
    ]


def test_a_page_prints_in_dark_ink_on_white(chromium: Any, pages: dict[str, Path]) -> None:
    show(chromium, pages["insertion"], scheme="dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    look = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    assert chromium.execute_script(look) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert chromium.execute_cdp_cmd("Page.printToPDF", {})["data"]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
