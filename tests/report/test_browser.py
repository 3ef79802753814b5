"""The page in a real browser: points that move, no word on the console, no request, any width."""

import functools
import shutil

import pytest

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium here"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as player:
        # A container's root has no other sandbox than the container.
        running = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module", params=["plain", "mixed"])
def address(request):
    path, _ = request.getfixturevalue(f"{request.param}_page")
    return path.as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page; what the console says and what is requested is collected and must be none."""
    contexts, said, asked = [], [], []

    def open_page(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("canvas[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) == {address}


def ink(page):
    """Where there is colour on the canvas: a coarse picture, to be compared."""
    return page.evaluate(
        """() => {
            const canvas = document.getElementById("motion");
            return canvas.toDataURL();
        }"""
    )


def at(page):
    return float(page.locator("#motion-slider").input_value())


def until(page, what):
    """Wait for a condition; the policy of the page forbids the browser to evaluate one itself."""
    for _ in range(400):
        if what():
            return
        page.wait_for_timeout(25)
    raise AssertionError("ten seconds have passed")


def test_the_slider_moves_the_points(opened):
    page = opened()
    seen = []
    last = float(page.locator("#motion-slider").get_attribute("max"))
    for place in (0, 0.5, 1, last):
        page.locator("#motion-slider").fill(str(place))
        assert at(page) == place
        seen.append(ink(page))
    assert len(set(seen)) == 4
    # And the way back is the same.
    page.locator("#motion-slider").fill("0")
    assert ink(page) == seen[0]


def test_keys_move_the_slider_by_tenths_and_steps(opened):
    page = opened()
    slider = page.locator("#motion-slider")
    slider.focus()
    before = ink(page)
    page.keyboard.press("ArrowRight")
    assert at(page) == pytest.approx(0.1)
    assert ink(page) != before
    page.keyboard.press("PageUp")
    assert at(page) == 1
    assert "step 1.0 of" in slider.get_attribute("aria-valuetext")
    assert "mean" in page.locator("#motion-now").inner_text()
    page.keyboard.press("End")
    assert at(page) == float(slider.get_attribute("max"))
    assert page.locator("#motion-now").inner_text().startswith("x: the rows")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert at(page) == 0


def test_play_goes_to_the_rows_and_pause_stops(opened):
    page = opened()
    play = page.locator("#motion-play")
    play.click()
    assert play.inner_text() == "Pause"
    until(page, lambda: at(page) > 0.3)
    play.click()
    assert play.inner_text() == "Play"
    stopped = at(page)
    page.wait_for_timeout(150)
    assert at(page) == stopped
    last = float(page.locator("#motion-slider").get_attribute("max"))
    page.locator("#motion-slider").fill(str(last - 0.2))
    play.click()
    until(page, lambda: play.inner_text() == "Play")
    assert at(page) == last


def test_any_two_columns_can_be_chosen(opened):
    page = opened()
    x, y = page.locator("#motion-x"), page.locator("#motion-y")
    before, label = ink(page), page.locator("#motion").get_attribute("aria-label")
    other = next(v for v in ("0", "1", "2") if v not in (x.input_value(), y.input_value()))
    x.select_option(other)
    assert ink(page) != before
    assert page.locator("#motion").get_attribute("aria-label") != label
    # The same column twice is no picture: they change places.
    kept = y.input_value()
    x.select_option(kept)
    assert (x.input_value(), y.input_value()) == (kept, other)


def test_rows_of_the_table_are_shown_at_the_end_only(opened):
    page = opened()
    last = page.locator("#motion-slider").get_attribute("max")
    box = page.locator("#motion-rows")
    for place, differs in (("0", False), (last, True)):
        page.locator("#motion-slider").fill(place)
        box.check()
        with_rows = ink(page)
        box.uncheck()
        assert (ink(page) != with_rows) == differs


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable_and_can_be_changed(opened, scheme):
    page = opened(color_scheme=scheme)
    contrast = functools.partial(page.evaluate, CONTRAST)
    assert contrast() >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    picture = ink(page)
    button = page.locator("#theme")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    button.click()
    assert button.get_attribute("aria-pressed") == str(scheme == "light").lower()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    assert ink(page) != picture
    assert contrast() >= 4.5


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_width_needs_scrolling_sideways(opened, width):
    page = opened(width=width, height=740, device_scale_factor=2)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = page.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter((e) => !e.closest(".scroll") && !e.closest("svg") && !e.closest(".unseen"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
            .map((e) => e.tagName + "." + e.className)"""
    )
    assert wider == []


def test_everything_is_reached_by_keyboard_and_shows_where_it_is(opened):
    page = opened()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """() => {
                const e = document.activeElement, s = getComputedStyle(e);
                const name = e.id || e.getAttribute("href") || e.tagName;
                return [name, s.outlineStyle, s.outlineWidth];
            }"""
        )
        if focus[0] == "BODY":
            break
        reached.append(focus[0])
        assert focus[1] != "none", focus
        assert float(focus[2].removesuffix("px")) >= 2, focus
    controls = {f"motion-{name}" for name in ("slider", "play", "back", "on", "x", "y", "rows")}
    assert controls | {"#flow", "theme", "SUMMARY"} <= set(reached)
    assert reached[0] == "#content"


def test_without_scripts_the_page_still_tells_everything(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("svg.chart").count() > 5
    assert page.locator("noscript").inner_text().startswith("The moving picture needs")
    assert not page.locator("#motion-controls").is_visible()
    assert not page.locator("#theme").is_visible()
    context.close()


CONTRAST = """() => {
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => {
            const c = v / 255;
            return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(colour)) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    let least = Infinity;
    for (const e of document.querySelectorAll("main *, nav *, footer, button, svg text")) {
        const shown = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!shown || e.closest("[hidden]")) continue;
        const style = getComputedStyle(e);
        const fill = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
        const [a, b] = [light(fill), light(ground(e))];
        least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    }
    return least;
}"""
