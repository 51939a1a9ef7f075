"""The page in a headless Chromium: on a phone and a desk, light and dark."""

import shutil
from itertools import product

import pytest
import word_model
from hostile_text import HOSTILE

from quietstar.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Those of a network would look for updates.
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(model_folder, tmp_path_factory):
    """Reports by name."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {"hostile": (model_folder, HOSTILE * 30), "words": (folder / "words", "the cat sat on a mat " * 9)}
    word_model.save(folder / "words")
    for name, (model, text) in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
        paths = {"--model": model, "--text": folder / f"{name}.txt", "-o": folder / f"{name}.html"}
        assert main(["report", *(str(part) for pair in paths.items() for part in pair)]) == 0
    assert main(["quickstart", "--tiny", "--controls", "--output_dir", str(folder / "new")]) == 0
    return {name: folder / f"{name}.html" for name in texts} | {"quickstart": folder / "new" / "report.html"}


@pytest.fixture
def open_page(browser, pages):
    """Opens a report; whatever the browser complains of or asks the network for fails the test at its end."""
    contexts, complaints = [], []

    def open_it(name, width=1280, scheme="light", touch=False, javascript=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch,
            java_script_enabled=javascript,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: complaints.append(request.url) if len(requests) else requests.append(1))
        requests = []
        page.goto(pages[name].as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def token_with_data(page, place=3):
    """A token of the text that something is known of."""
    return page.locator("#text b:not(.first)").nth(place)


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [*product(["hostile", "words", "quickstart"], [400, 1280], ["light", "dark"])]
)
def test_nothing_is_wider_than_the_screen(open_page, name, width, scheme):
    page = open_page(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert red > 200 if scheme == "light" else red < 50
    assert page.locator("figure svg[role=img]").count() >= 2


def test_pointing_at_a_token_shows_its_thought(open_page):
    page = open_page("words")
    data = page.evaluate('JSON.parse(document.getElementById("data").textContent)')
    for place in (3, 20):
        token_with_data(page, place).hover()
        row = data["rows"][1:][place]
        assert page.locator("[data-field=token]").inner_text() == data["strings"][row[0]]
        assert page.locator("[data-field=thought]").inner_text() == data["strings"][row[1]]
        weight = page.locator("[data-field=weight]").inner_text()
        assert float(weight.replace("−", "-")) == pytest.approx(row[2], abs=6e-4)
        for field, logp in (("before", row[3]), ("after", row[4])):
            shown = page.locator(f"[data-field={field}]").inner_text().split()[0]
            assert float(shown.replace("−", "-")) == pytest.approx(logp, abs=6e-3)
        for field, first in (("before", 5), ("after", 11)):
            names = page.locator(f"[data-field=likeliest-{field}] bdi").all_inner_texts()
            assert names == [data["strings"][i] for i in row[first : first + 6 : 2]]


def test_a_click_stays_and_pointing_elsewhere_is_passing(open_page):
    page = open_page("words")
    token_with_data(page, 3).click()
    weight = page.locator("[data-field=weight]")
    chosen = weight.inner_text()
    token_with_data(page, 9).hover()
    assert weight.inner_text() != chosen
    page.locator("h1").hover()
    assert weight.inner_text() == chosen


def test_keys_go_from_token_to_token(open_page):
    page = open_page("words", width=700)
    token_with_data(page, 0).click()

    def place():
        return page.evaluate("[...document.querySelectorAll('#text b')].indexOf(document.activeElement)")

    def line():
        return page.evaluate("document.activeElement.getBoundingClientRect().top + scrollY")

    assert place() == 1
    page.keyboard.press("ArrowRight")
    assert place() == 2
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # nothing is known of the first token
    assert place() == 1
    first = line()
    page.keyboard.press("ArrowDown")
    assert line() > first
    page.keyboard.press("ArrowUp")
    assert line() == first
    page.keyboard.press("End")
    assert place() == page.locator("#text b").count() - 1
    page.keyboard.press("Home")
    assert place() == 1
    assert page.locator("#text b[tabindex='0']").count() == 1  # one stop for the tabulator


def test_on_a_phone_a_tap_opens_a_sheet_that_leaves_the_token_in_sight(open_page):
    page = open_page("hostile", width=400, touch=True)
    panel, token = page.locator("#panel"), token_with_data(page, 300)
    assert not panel.is_visible()
    token.tap()
    assert panel.is_visible()
    sheet, box = panel.bounding_box(), token.bounding_box()
    assert box["y"] + box["height"] <= sheet["y"]
    assert sheet["y"] + sheet["height"] <= 900
    page.get_by_role("button", name="Close").tap()
    assert not panel.is_visible()


def test_a_button_goes_to_the_token_that_gained_most(open_page):
    page = open_page("hostile")
    button = page.locator("[data-token]").first
    place = int(button.get_attribute("data-token"))
    button.click()
    assert page.evaluate("[...document.querySelectorAll('#text b')].indexOf(document.activeElement)") == place
    assert page.locator("#text b").nth(place).evaluate("e => e.classList.contains('shown')")


def test_the_text_is_there_without_scripts(open_page):
    page = open_page("words", javascript=False)
    assert page.locator("#text").inner_text().startswith("the cat sat on a mat the cat")
    assert not page.locator("#panel").is_visible()
