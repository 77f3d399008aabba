"""The report's page as a browser draws it: charts, tables, colours, phones, print, keyboard, screen readers."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fastjepa.report.charts import TABLE_LINES
from fastjepa.report.page import write_page
from fastjepa.report.pictures import png_bytes
from tests.support.reports import write_run

pytestmark = pytest.mark.xdist_group("page")  # one browser serves all

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS = range(5, 101, 5)
LIGHT, DARK = "rgb(251, 251, 249)", "rgb(18, 22, 27)"
RESULT = {"accuracy": 0.5, "ci95": [0.4, 0.6]}
ROWS = {name: {"knn": RESULT, "linear": RESULT, "linear_bn": RESULT, "effective_rank": 2.0}
        for name in ("raw pixels", "target encoder")}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert BROWSER, "there is no Chromium for the tests of the report's page: run `make browser`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs: one reads its features at every tenth step, one was evaluated and has pictures."""
    root = tmp_path_factory.mktemp("runs")
    entries = [{"step": step, "loss": 1 / step, "lr": 1e-3, "skipped": 0, "mfu": None} for step in STEPS]
    for entry in entries[1::2]:
        entry["effective_rank"] = entry["step"] / 2
    first = write_run(root / "first", entries)
    second = write_run(root / "second", entries[:5], {"optimization": {"lr": 0.5}, "loss": {"kind": "l2"}})
    (second / "evaluation.json").write_text(json.dumps(
        {"data": "own", "n_train": 6, "n_test": 9, "rows": ROWS, "verdict": ["It learned."]}))  # fmt: skip
    (second / "pictures").mkdir()
    for name in ("masks", "pca", "samples"):
        (second / "pictures" / f"{name}.png").write_bytes(png_bytes(np.full((300, 900, 3), (0, 128, 128), np.uint8)))
    return [first, second]


@pytest.fixture
def opened(browser: Browser, runs: list[Path], tmp_path: Path):
    """Opens the page of the two runs in a window of its own; the test fails on whatever the console or a request says."""
    write_page(runs, tmp_path / "report.html")
    said, contexts = [], []

    def open_page(**settings) -> Page:
        url = (tmp_path / "report.html").as_uri()
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def numbers(page: Page, chart: str) -> list[int]:
    """How many points each line of a chart has."""
    paths = page.locator(f"#chart-{chart} .plot svg g[aria-label=line] path").evaluate_all(
        "paths => paths.map(path => path.getAttribute('d'))"
    )
    return [len(re.findall("[ML]", path)) for path in paths]


def test_every_reading_is_drawn_point_for_point(opened):
    page = opened()
    assert page.locator(".plot > svg").count() == 3  # loss, effective rank and lr; nothing was skipped, no MFU measured
    assert numbers(page, "loss") == [len(STEPS), 5] and numbers(page, "effective_rank") == [len(STEPS) // 2, 2]
    assert page.locator("#chart-loss g[aria-label=dot] circle").count() == len(STEPS) + 5
    heights = page.locator("#chart-loss g[aria-label=dot] circle").evaluate_all(
        "dots => dots.map(dot => +dot.getAttribute('cy'))"
    )
    assert heights[: len(STEPS)] == sorted(heights[: len(STEPS)])  # a falling loss goes down the screen
    label = page.locator("#chart-loss .plot").get_attribute("aria-label")
    assert "first from 0.2000 at step 5 to 0.0100 at step 100; second from 0.2000 at step 5 to 0.0400 at step 25" in label


@pytest.mark.parametrize("last", [90, 1400, 30000])
def test_steps_on_the_axis_stand_apart(browser: Browser, tmp_path: Path, last: int):
    """In the narrow charts of a wide window, and across a phone."""
    run = write_run(tmp_path / "run", [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in (last // 10, last)])
    write_page([run], tmp_path / "report.html")
    for width in (1200, 390):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((tmp_path / "report.html").as_uri())
        labels = page.locator("#chart-loss g[aria-label='x-axis tick label'] text")
        boxes = labels.evaluate_all("texts => texts.map(text => text.getBoundingClientRect().toJSON())")
        page.close()
        assert len(boxes) >= 2 and all(one["right"] + 4 < next_["left"] for one, next_ in pairwise(boxes))


def test_lines_differ_by_more_than_their_colour(opened):
    lines = opened().locator("#chart-loss g[aria-label=line]")
    looks = [
        tuple(lines.nth(i).evaluate("g => [getComputedStyle(g).stroke, g.getAttribute('stroke-dasharray')]")) for i in (0, 1)
    ]
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]


def test_tables_hold_what_is_drawn(opened):
    page = opened()
    table = page.locator("#chart-loss table")
    assert not table.is_visible()
    page.locator("#chart-loss summary").click()
    assert table.is_visible() and table.locator("tbody tr").count() == min(TABLE_LINES, len(STEPS))
    assert table.locator("tbody tr").nth(1).all_inner_texts() == ["10\t0.1000\t0.1000"]
    assert page.locator("table.probes td.bar").count() == len(ROWS) * 3
    assert page.locator("table.probes tbody tr").nth(1).inner_text().split("\t")[:2] == ["target encoder", "50.0 ± 10.0"]
    differing = page.get_by_role("region", name="Settings that differ").locator("tbody th").all_inner_texts()
    assert differing == ["optimization.lr", "loss.kind"]
    assert page.get_by_role("img", name="Samples of the predictor").evaluate("image => image.naturalWidth") == 900
    assert "first: masks and principal components could not be drawn" in page.locator("main").inner_text()


def test_a_point_says_its_value(opened):
    page = opened()
    chart = page.locator("#chart-loss .plot > svg")
    box = chart.bounding_box()
    chart.hover(position={"x": box["width"] - 14, "y": box["height"] / 2})
    expect(chart.locator("g[aria-label=tip] text")).to_contain_text("step 100​Loss: 0.0100")


@pytest.mark.parametrize("scheme, ground", [("light", LIGHT), ("dark", DARK)])
def test_light_and_dark(opened, scheme, ground):
    """Axe checks the contrast of text against what is behind it; this checks that of lines."""
    page = opened(color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    stroke = page.locator("#chart-loss g[aria-label=line]").first.evaluate("line => getComputedStyle(line).stroke")
    sheet = page.locator("#chart-loss").evaluate("figure => getComputedStyle(figure).backgroundColor")
    assert contrast(stroke, sheet) >= 3
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found.response["violations"]] == []


def contrast(*colours: str) -> float:
    """WCAG's ratio of two rgb() colours."""

    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_on_a_phone_nothing_is_wider_than_the_screen(opened):
    page = opened(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    for details in page.locator("details > summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    assert max(page.locator(".plot > svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().right)")) <= 320


def test_the_keyboard_reaches_everything_in_order(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # it shows itself
    order = []
    for _ in range(20):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("""() => { const it = document.activeElement;
            return it.hash ?? it.ariaLabel ?? it.closest('details')?.id ?? ''; }""")
        )
    links = ["summary", "learning", "evaluations", "pictures", "schedules", "configuration", "versions"]
    rest = ["What each run is and where it stands", "chart-loss-table", "chart-effective_rank-table",
            "second, own: encoders and baselines", "chart-lr-table", "Settings that differ", "settings",
            "Software and machine"]  # fmt: skip
    wanted = [f"#{link}" for link in links] + rest
    assert order[: len(wanted)] == wanted
    page.locator("#chart-loss summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#chart-loss table").is_visible()
    assert page.locator("#chart-loss summary").evaluate("it => getComputedStyle(it).outlineStyle") == "solid"


def test_headings_are_in_order(opened):
    levels = opened().locator("h1, h2, h3, h4, h5, h6").evaluate_all("all => all.map(heading => +heading.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_in_print_it_is_light_and_complete(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible() and page.locator(".plot > svg").count() == 3
    page.emulate_media(media=None)
    printed = page.pdf(format="A4")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8


def test_without_javascript_the_tables_remain(opened):
    page = opened(java_script_enabled=False)
    assert "The curves are drawn by JavaScript, which is off" in page.locator("main").inner_text()
    assert page.locator("#chart-loss tbody tr").count() == min(TABLE_LINES, len(STEPS))
