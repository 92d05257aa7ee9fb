"""The page in a real browser: phone and desktop widths, light and dark, with and without JavaScript.

Needs playwright (`pip install '.[browser]'`) and Chromium on the PATH. Screenshots go to $LLMKIT_SCREENSHOTS, if set.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_runs import attempt, make_pipeline, make_run, write_lines

from llmkit.stages.report import ReportConfig, run

pytestmark = pytest.mark.slow
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    runs = make_pipeline(place)
    long = make_run(place / ("long-name" * 9), "rl", runs[3], results={"steps": 1}, command=f"rl {'x/' * 200}")
    write_lines(long / "rollouts.jsonl", [attempt(step, step, "w" * 900, step) for step in range(60)])
    out = place / "report.html"
    run(ReportConfig(runs=(*map(str, runs), str(long)), out=str(out), quiet=True))
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_makes_no_requests(browser, page_file, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert said == [] and asked == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, ground[4:-1].split(","))) < 60) == (scheme == "dark")
    outside = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((node) => !node.closest(".scroll, svg, pre")
             && node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    if place := os.environ.get("LLMKIT_SCREENSHOTS"):
        page.screenshot(path=f"{place}/report-{width}-{scheme}.png", full_page=True)
    context.close()


def test_records_are_searched_sorted_and_shown_bit_by_bit(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    visible = "#records tbody tr:not([hidden])"
    total = page.locator("#records tbody tr").count()
    assert page.locator(visible).count() == 25 < total
    page.locator("#more").click()
    assert page.locator(visible).count() == 50
    page.locator("#query").fill("example.org/3 Page")
    assert page.locator(visible).count() == 1 and page.locator("#count").inner_text() == f"1 of {total} records"
    page.locator("#query").fill("")
    page.locator("#file").select_option(index=1)
    worth = page.locator("#records thead th").nth(3)
    worth.locator("button").click()
    worth.locator("button").click()
    assert worth.get_attribute("aria-sort") == "descending"
    shown = [float(text) for text in page.locator(f"{visible} .worth strong data").all_inner_texts()]
    assert shown == sorted(shown, reverse=True) and len(shown) == 25
    page.close()


def test_without_script_the_table_is_whole(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("#records tbody tr:visible").count() == page.locator("#records tbody tr").count() > 50
    assert not page.locator("#browse").is_visible() and not page.locator("#more").is_visible()
    context.close()


def test_a_point_of_a_curve_tells_its_value(browser, page_file):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    band = page.locator("#training-1 .band").nth(4)
    band.hover(force=True)
    assert page.evaluate("node => getComputedStyle(node).opacity", band.element_handle()) == "0.08"
    assert "step 5\ntraining 5.6875" in band.locator("title").text_content()
    assert page.locator("#training-1 .readout").first.inner_text().startswith("step 5 · training 5.6875")
    page.close()


def test_a_finger_reads_a_curve_too(browser, page_file):
    context = browser.new_context(viewport={"width": 360, "height": 800}, has_touch=True)
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.locator("#training-1 .band").nth(4).tap(force=True)
    assert page.locator("#training-1 .readout").first.inner_text().startswith("step 5 · training 5.6875")
    context.close()


def test_the_graph_fits_on_a_screen_and_a_run_opens(browser, page_file):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    assert page.locator(".graph").bounding_box()["height"] < 900
    command = page.locator("#pipeline .command").first
    assert not command.is_visible()
    page.locator("#pipeline summary").first.click()
    assert command.is_visible()
    page.close()
