"""The pages in a real browser: make test-browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_gpt2.report import page as report

pytestmark = pytest.mark.browser

WIDTHS = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the one of the system where there is one, else Playwright's own."""
    from playwright.sync_api import sync_playwright  # make test-browser installs it

    with sync_playwright() as playwright:
        there = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=there, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def tab(request, browser) -> Iterator[Any]:
    """A page that must not fail, nor load anything from elsewhere, nor be wider than its window."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    tab, faults = context.new_page(), []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda said: _fault(said) and faults.append(said.text))
    tab.on("request", lambda asked: _own(asked.url) or faults.append(asked.url))
    yield tab
    assert not faults
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    if folder := os.environ.get("SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"{request.node.originalname}-{width}.png", full_page=True)
    context.close()


def _fault(said: Any) -> bool:
    """A refused question is no fault of the page."""
    return said.type == "error" and "status of 422" not in said.text


def _own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1", "http://localhost", "file:", "data:"))


def test_an_input_is_typed_and_its_beams_are_read(tab, address, playground):
    tab.goto(address)
    tab.fill("#input", "red cat")
    tab.select_option("#first", "adapter")
    tab.select_option("#second", "other")
    tab.fill("input[name=beam_size]", "4")
    tab.fill("input[name=eval_len]", "12")
    tab.click("text=Decode")
    tab.wait_for_selector("section:nth-of-type(2)")
    sections = tab.query_selector_all("section")
    for section, name in zip(sections, ("adapter", "other"), strict=True):
        asked = {"input": "red cat", "adapter": name, "decoding": {"beam_size": 4, "eval_len": 12}}
        expected = playground.decode(asked)
        assert section.query_selector("h2").inner_text().startswith(name)
        items = section.query_selector_all("ol > li")
        assert len(items) == len(expected["outputs"]) == 4
        for item, output in zip(items, expected["outputs"], strict=True):
            assert output["text"] in item.inner_text().replace("\xa0", " ")
            assert f"{output['score']:.3f}" in item.inner_text()
        ranks = [one.inner_text() for one in section.query_selector_all(".tree .rank")]
        assert sorted(ranks) == ["1", "2", "3", "4"]
        drawn = section.query_selector_all(".tree .token")
        assert len(drawn) < len(expected["tree"]), "what was given up is not shown"
    tab.check("#all")
    all_drawn = tab.query_selector_all("section:first-of-type .tree .token")
    asked = {"input": "red cat", "adapter": "adapter", "decoding": {"beam_size": 4, "eval_len": 12}}
    assert len(all_drawn) == len(playground.decode(asked)["tree"])


def test_an_input_is_picked_and_a_fault_is_told(tab, address, playground):
    tab.goto(address)
    tab.wait_for_selector("#picking:not([hidden])")
    tab.fill("#pick", playground.examples[1])
    assert tab.input_value("#input") == playground.examples[1]
    tab.fill("#input", "<img src=x onerror=alert(1)> " + "x " * 99)
    tab.click("text=Decode")
    tab.wait_for_selector("#status.error")
    assert "exceed the model's 64 positions" in tab.inner_text("#status")


@pytest.mark.parametrize("shown", ["sweep", "run"])
def test_the_report_of_a_sweep_and_of_a_run(tab, tmp_path, swept, shown):
    folder = swept if shown == "sweep" else swept / "0"
    report.write(folder, tmp_path / "report.html")
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.inner_text("h1") == folder.name
    titles = [one.inner_text() for one in tab.query_selector_all("h2")]
    assert {"Scores", "Pictures", "Best predictions", "To repeat it"} <= set(titles)
    for picture in tab.query_selector_all("figure svg"):
        box = picture.bounding_box()
        width, height = map(float, picture.get_attribute("viewBox").split()[2:])
        inside = (box["height"] - 2) / (box["width"] - 2)  # of a border of one pixel
        assert inside == pytest.approx(height / width, rel=0.01), "squashed"
        assert box["width"] > min(width, tab.viewport_size["width"]) / 2
