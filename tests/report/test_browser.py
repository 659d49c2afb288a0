"""The page in a real browser: it draws, answers to mouse and keys, asks the network for nothing, and logs nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mla_tune.report.contents import Contents
from mla_tune.report.page import page

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium (Debian, Ubuntu: apt install chromium) and playwright (pip install 'mla-tune[dev]')",
)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_PATIENCE_MS = 120_000


@dataclass
class Opened:
    """One open page, and everything that it asked for and said."""

    tab: Any
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def drawn(self) -> int:
        """How often everything was drawn."""
        return int(self.tab.evaluate("Number(document.body.dataset.drawn ?? 0)"))

    def wait(self, draws: int) -> None:
        """Wait until everything was drawn so often."""
        self.tab.wait_for_function(f"Number(document.body.dataset.drawn ?? 0) >= {draws}", timeout=_PATIENCE_MS)

    def text(self, place: str) -> str:
        return str(self.tab.inner_text(f"#{place}"))

    def state(self) -> str:
        return str(self.tab.evaluate("location.hash"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=list(_FLAGS), timeout=_PATIENCE_MS)
        yield running
        running.close()


def opened(browser: Any, file: Path, **context: Any) -> Opened:
    """The page in a window of its own, drawn."""
    tab = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
    found = Opened(tab)
    tab.on("request", lambda request: found.requests.append(request.url))
    tab.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: found.said.append(f"error: {error}"))
    tab.goto(file.as_uri())
    found.wait(1)
    return found


@pytest.fixture(scope="module")
def file(h100: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(page(h100))
    return path


@pytest.fixture(scope="module")
def shown(browser: Any, file: Path) -> Iterator[Opened]:
    """The page on a wide, light screen; it must have asked for nothing and logged nothing when the last test is done."""
    found = opened(browser, file)
    yield found
    assert found.requests == [file.as_uri()]
    assert found.said == []


def choose(shown: Opened, name: str, value: str) -> None:
    before = shown.drawn()
    shown.tab.locator(f"#choose-{name} input[value={json.dumps(value)}]").check(force=True)
    shown.wait(before + 1)


def markers(shown: Opened) -> int:
    script = (
        "document.getElementById('map').data.filter((t) => t.meta === 'points').reduce((n, t) => n + t.x.length, 0)"
    )
    return int(shown.tab.evaluate(script))


def test_every_chart_is_drawn_and_the_page_asks_for_nothing(shown: Opened, file: Path) -> None:
    for name in ("map", "spread", "stage"):
        assert shown.tab.locator(f"#{name} svg.main-svg").count() >= 1
    assert shown.tab.locator("#failed").is_hidden()
    assert shown.requests == [file.as_uri()]
    assert shown.said == []


def test_every_measured_shape_of_the_chosen_requests_is_a_sign_on_the_map(shown: Opened, h100: Contents) -> None:
    for index, entry in enumerate(h100.maps):
        if entry.policy == 1 and entry.layer == "forward" and entry.site == "prefill_attention":
            button = shown.tab.locator(f"button[data-map='{index}']").first
            before = shown.drawn()
            button.evaluate("button => button.click()")
            shown.wait(before + 1)
            view = next(view for view in entry.views if f"view={view.num_reqs[0]}-{view.num_reqs[1]}" in shown.state())
            inside = [p for p in entry.points if view.num_reqs[0] <= p.num_reqs <= view.num_reqs[1]]
            assert markers(shown) == len(inside)
            assert shown.text("map-verdict") == entry.win.sentence


def test_hovering_a_shape_gives_medians_and_intervals(shown: Opened) -> None:
    place = shown.tab.evaluate(
        """() => {
          const map = document.getElementById("map");
          map.scrollIntoView({block: "center"});
          const { _size, xaxis, yaxis } = map._fullLayout, { left, top } = map.getBoundingClientRect();
          const data = map.data.find((trace) => trace.meta === "points");
          return [left + _size.l + xaxis.d2p(data.x[0]), top + _size.t + yaxis.d2p(data.y[0])];
        }"""
    )
    shown.tab.mouse.move(*place)
    shown.tab.wait_for_selector("#map .hoverlayer .hovertext", timeout=_PATIENCE_MS)
    told = str(shown.tab.text_content("#map .hoverlayer"))
    assert "query tokens" in told
    assert "95 %:" in told
    assert "µs" in told or "ms" in told
    assert "the policy takes" in told
    shown.tab.mouse.move(1, 1)


def test_model_layer_and_provider_can_be_chosen(shown: Opened) -> None:
    choose(shown, "policy", "0")
    assert "mla-tune's kernels" in shown.text("map-where")
    choose(shown, "engine", "vllm")
    assert "DeepSeek-V3.2" in shown.text("map-title")
    choose(shown, "engine", "sglang")
    choose(shown, "model", "deepseek-v4-flash|64")
    choose(shown, "layer", "c4a")
    assert shown.text("map-title").startswith("DeepSeek-V4-Flash, 64 heads, c4a layers")
    choose(shown, "site", "indexer_metadata")
    assert "indexer metadata" in shown.text("map-title")
    choose(shown, "site", "prefill_attention")
    choose(shown, "policy", "1")
    assert "SGLang 0.5.23's kernels" in shown.text("map-where")


def test_what_is_drawn_can_be_switched_off_and_on(shown: Opened) -> None:
    assert markers(shown) > 0
    for name in ("points", "areas", "rules"):
        before = shown.tab.evaluate("document.getElementById('map').data.length")
        shown.tab.locator(f"#map-key [data-toggle={name}]").uncheck()
        shown.tab.wait_for_function(f"document.getElementById('map').data.length < {before}", timeout=_PATIENCE_MS)
        shown.tab.locator(f"#map-key [data-toggle={name}]").check()
        shown.tab.wait_for_function(f"document.getElementById('map').data.length === {before}", timeout=_PATIENCE_MS)


def test_everything_works_by_keyboard(shown: Opened) -> None:
    shown.tab.locator("#choose-model input:checked").focus()
    before, title = shown.drawn(), shown.text("map-title")
    shown.tab.keyboard.press("ArrowRight")
    shown.wait(before + 1)
    assert shown.text("map-title") != title
    assert shown.tab.evaluate("document.activeElement.name") == "model"
    shown.tab.locator("#map").focus()
    shown.tab.keyboard.press("ArrowRight")
    first = shown.text("said")
    assert "query tokens" in first
    shown.tab.keyboard.press("ArrowRight")
    assert shown.text("said") != first
    shown.tab.locator("#map-key [data-toggle=rules]").focus()
    shown.tab.keyboard.press("Space")
    assert not shown.tab.locator("#map-key [data-toggle=rules]").is_checked()
    shown.tab.locator("#map-key [data-toggle=rules]").press("Space")


def test_dark_ground_follows_the_system_and_the_button(shown: Opened) -> None:
    paper = "document.getElementById('map').layout.paper_bgcolor"
    before = shown.drawn()
    shown.tab.emulate_media(color_scheme="dark")
    shown.wait(before + 1)
    assert shown.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert shown.tab.evaluate(paper) == "#14171b"
    shown.tab.locator("#theme").click()
    shown.wait(before + 2)
    assert shown.tab.evaluate(paper) == "#ffffff"
    shown.tab.locator("#theme").click()
    shown.wait(before + 3)
    assert shown.tab.evaluate(paper) == "#14171b"


def test_on_paper_everything_is_on_light_ground_and_controls_are_gone(shown: Opened) -> None:
    before = shown.drawn()
    shown.tab.emulate_media(media="print")
    shown.wait(before + 1)
    assert shown.tab.evaluate("document.getElementById('map').layout.paper_bgcolor") in ("#fff", "#ffffff")
    assert shown.tab.locator("form.controls").is_hidden()
    assert shown.tab.locator("#map").is_visible()
    shown.tab.set_viewport_size({"width": 700, "height": 900})  # a sheet of A4
    for name in ("map", "spread", "stage"):
        assert shown.tab.locator(f"#{name} .main-svg").first.bounding_box()["width"] <= 700
    shown.tab.set_viewport_size({"width": 1280, "height": 900})
    shown.tab.emulate_media(media="screen", color_scheme="light")
    shown.wait(before + 2)


def test_a_phone_shows_it_without_scrolling_sideways(shown: Opened) -> None:
    before = shown.drawn()
    shown.tab.set_viewport_size({"width": 400, "height": 800})
    shown.wait(before + 1)
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= 400
    assert shown.tab.evaluate("document.getElementById('map')._fullLayout.width") <= 400
    shown.tab.set_viewport_size({"width": 1280, "height": 900})
    shown.wait(before + 2)


def test_a_choice_is_in_the_address_so_that_a_reviewer_can_be_sent_to_it(
    browser: Any, file: Path, shown: Opened
) -> None:
    choose(shown, "layer", "dsa" if "layer=forward" in shown.state() and "v3.2" in shown.state() else "c4a")
    other = browser.new_context().new_page()
    other.goto(f"{file.as_uri()}{shown.state()}")
    again = Opened(other)
    again.wait(1)
    assert again.text("map-title") == shown.text("map-title")
    assert "layers" in again.text("map-title")
    other.context.close()
