"""The page in a real browser: type, drop a picture, click, filter, judge, keys only, at a phone's width.

Needs Playwright and a Chromium on the PATH; without them these tests are skipped.
"""

import base64
import shutil
from contextlib import closing, contextmanager

import pytest

from test_video import clip
from twofold.data.sources import Column, Source
from twofold.retrieve.feedback import Feedback
from twofold.retrieve.index import Index

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


NAMELESS = """() => [...document.querySelectorAll('button, input, canvas')].filter((one) => !(
    one.innerText?.trim() || one.getAttribute('aria-label') || one.labels?.length || one.title
)).map((one) => one.outerHTML)"""

# The contrast of WCAG 2.2 between the page and some of its texts.
CONTRAST = """() => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const light = (one, what) => {
        const [r, g, b] = getComputedStyle(one)[what].match(/[\\d.]+/g).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(document.body, 'backgroundColor');
    return ['.caption', '.score', '#status', 'h1 a'].map((name) => {
        const ink = light(document.querySelector(name), 'color');
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    });
}"""

DROP = """(content) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const dragged = new DataTransfer();
    dragged.items.add(new File([bytes], 'dropped.png', { type: 'image/png' }));
    for (const type of ['dragenter', 'drop'])
        dispatchEvent(new DragEvent(type, { dataTransfer: dragged, bubbles: true, cancelable: true }));
}"""

PAINTED = """() => {
    const canvas = document.querySelector('#map canvas');
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, at) => at % 4 === 3 && value > 0).length > 500;
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory, untrained, emoji, serving):
    """Emoji behind a server."""
    root = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOLD_CACHE", str(root / "cache"))
        Index.build(emoji, untrained, root / "index")
        with serving(root / "index") as address:
            yield address, root / "index"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, untrained, emoji, serving):
    """Emoji of which every third is a picture, a text or a clip, behind another server."""
    root = tmp_path_factory.mktemp("mixed")
    kinds = [number % 3 for number in range(len(emoji))]
    source = Source(
        "mixed",
        emoji.ids,
        images=[image if kind == 0 else b"" for kind, image in zip(kinds, emoji.images, strict=True)],
        texts=[texts if kind == 1 else [] for kind, texts in zip(kinds, emoji.texts, strict=True)],
        columns={"video": Column("video", [clip(n) if kind == 2 else b"" for n, kind in enumerate(kinds)])},
        meta={"name": [texts[0] for texts in emoji.texts]},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOLD_CACHE", str(root / "cache"))
        Index.build(source, untrained, root / "index", modality="image,text,video", texts="none")
        with serving(root / "index") as address:
            yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@contextmanager
def opened_page(browser, address: str):
    """The page, loaded; whatever its scripts complain of fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, bypass_csp=True)  # waiting evaluates
    context.set_default_timeout(60_000)
    opened, complaints = context.new_page(), []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    opened.goto(address)
    opened.wait_for_selector("#status:has-text('149 items')")
    yield opened
    context.close()
    assert complaints == []


@pytest.fixture
def page(browser, served):
    with opened_page(browser, served[0]) as opened:
        yield opened


def ask(page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text(' ms')")


def captions(page) -> list[str]:
    return page.locator("#results .caption").all_text_contents()


def test_words_find_and_the_address_keeps_them(page):
    ask(page, "red heart")
    found = captions(page)
    assert len(found) == 48
    page.wait_for_function("document.querySelector('.shot img').naturalWidth > 0")
    page.reload()
    page.wait_for_selector("#status:has-text(' ms')")
    assert captions(page)[:48] == found and page.input_value("#text") == "red heart"


def test_more_comes_on_scrolling(page):
    ask(page, "red heart")
    page.mouse.wheel(0, 100_000)
    page.wait_for_function("document.querySelectorAll('button.hit').length === 96")
    assert len(set(captions(page))) > 90


def test_a_picture_finds_its_like(page, served, emoji):
    item = emoji.take([7])
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": item.images[0]})
    page.wait_for_selector("#status:has-text(' ms')")
    with closing(Index.open(served[1])) as index:
        hits = index.search(image=item.images[0], k=49)  # as the page asks: 48, and whether there are more
    assert captions(page)[:48] == [hit.meta["text"] for hit in hits[:48]]
    assert page.locator(".chip").inner_text().startswith("mine.png")
    page.click(".chip button")
    page.wait_for_selector("#status:has-text('149 items')")


def test_filters_narrow_what_is_found(page):
    ask(page, "a face")
    page.click("#filters-toggle")
    page.check("input[value='group=flags']")
    page.wait_for_selector(".chip.filter")
    page.wait_for_function("document.querySelectorAll('button.hit').length < 48")
    assert all("flag" in caption.lower() for caption in captions(page))
    assert "where=group%3Dflags" in page.url


def test_more_and_less_like_a_hit_and_the_way_back(page):
    ask(page, "a face")
    first = captions(page)[0]
    page.click("button.hit >> nth=0")
    page.wait_for_selector("#one[open]")
    assert page.inner_text("#one-title") == first
    page.click("#one-like")
    page.wait_for_selector(".chip.plus")
    page.wait_for_function("document.querySelector('#text').value === ''")
    page.wait_for_selector("#status:has-text(' ms')")
    assert first not in captions(page)  # an example is not found itself
    page.click("button.hit >> nth=2")
    page.click("#one-unlike")
    page.wait_for_selector(".chip.minus")
    page.go_back()
    page.wait_for_function("!document.querySelector('.chip.minus')")
    page.go_back()
    page.wait_for_function("document.querySelector('#text').value === 'a face'")


def test_keys_alone_search_open_judge_and_go_on(page, served):
    Feedback(served[1]).path.unlink(missing_ok=True)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type("a face")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text(' ms')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#one[open]")
    second = page.inner_text("#one-title")
    assert second == captions(page)[1]
    page.keyboard.press("+")
    page.wait_for_selector("#one-right[aria-pressed=true]")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('#one-title').textContent !== {second!r}")
    page.keyboard.press("-")
    page.wait_for_selector("#one-wrong[aria-pressed=true]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#one:not([open])", state="attached")
    (judged,) = Feedback(served[1]).judged()
    assert (judged.text, len(judged.positives), len(judged.negatives)) == ("a face", 1, 1)
    assert page.locator(".mark.good").count() == page.locator(".mark.bad").count() == 1


def test_words_against_looks(page):
    ask(page, "a face")
    assert page.is_hidden("#mix")
    page.click("button.hit >> nth=0")
    page.click("#one-like")
    page.wait_for_selector(".chip.plus")
    ask(page, "something else")
    page.wait_for_selector("#mix:not([hidden])")
    mixed, shown = captions(page), page.text_content("#results")
    page.focus("#weight")
    page.keyboard.press("End")
    page.wait_for_function("location.search.includes('weight=0')")
    page.wait_for_function("before => document.querySelector('#results').textContent !== before", arg=shown)
    assert captions(page) != mixed and page.get_attribute("#weight", "aria-valuetext") == "0 % words, 100 % looks"


def test_filters_alone_list_what_they_leave(page):
    page.wait_for_function("document.querySelectorAll('button.hit').length === 48")  # before anything is asked
    assert page.locator(".score").count() == 0
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("f")
    page.check("input[value='group=flags']")
    page.wait_for_selector("#status:has-text('in this part')")
    assert all("flag" in caption.lower() for caption in captions(page))


def test_help_lists_the_keys_and_escape_leads_back(page):
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    assert "more like this" in page.inner_text("#help")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help:not([open])", state="attached")
    ask(page, "a face")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("a")  # on a tile: an example beside the words
    page.wait_for_selector(".chip.plus")
    assert page.input_value("#text") == "a face" and page.is_visible("#mix")


def test_a_picture_is_dropped(page, served, emoji):
    content = emoji.take([7]).images[0]
    page.evaluate(DROP, base64.b64encode(content).decode())
    page.wait_for_selector(".chip:has-text('dropped.png')")
    page.wait_for_selector("#status:has-text(' ms')")
    with closing(Index.open(served[1])) as index:
        assert captions(page)[0] == index.search(image=content, k=49)[0].meta["text"]


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page, "a face")
    page.click("#filters-toggle")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("button.hit >> nth=0")
    page.wait_for_selector("#one[open]")
    box = page.locator("#one").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_everything_that_can_be_used_has_a_name(page):
    ask(page, "a face")
    page.click("button.hit >> nth=0")
    nameless = page.evaluate(NAMELESS)
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ask(page, "a face")
    ratios = page.evaluate(CONTRAST)
    assert min(ratios) >= 4.5  # WCAG 2.2, AA


def test_the_map_shows_the_collection_and_a_lasso_chooses(page):
    ask(page, "a face")
    page.click("#map-toggle")
    page.wait_for_selector("#map-note:has-text('149 items')")
    box = page.locator("#map canvas").bounding_box()
    page.wait_for_function(PAINTED)
    page.keyboard.down("Shift")
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    for x, y in ((1, 0), (1, 1), (0, 1)):
        page.mouse.move(box["x"] + 5 + x * (box["width"] - 10), box["y"] + 5 + y * (box["height"] - 10))
    page.mouse.up()
    page.keyboard.up("Shift")
    page.wait_for_selector(".chip:has-text('149 chosen on the map')")
    page.click("#map-lasso")  # by touch there is no Shift
    page.mouse.move(box["x"] + 5, box["y"] + 60)
    page.mouse.down()
    for x, y in ((0.5, 0.1), (0.5, 1), (0, 1)):
        page.mouse.move(box["x"] + 5 + x * (box["width"] - 10), box["y"] + 5 + y * (box["height"] - 10))
    page.mouse.up()
    page.wait_for_function("!document.querySelector('.chip.filter').textContent.startsWith('149')")
    part = int(page.inner_text(".chip.filter span").split()[0])
    page.click("text=Show them")
    page.wait_for_function(f"document.querySelectorAll('button.hit').length === Math.min({part}, 48)")
    assert 0 < part < 149


def test_pictures_texts_and_clips_stand_side_by_side(browser, mixed):
    with opened_page(browser, mixed) as page:
        ask(page, "a face")
        kinds = page.locator("#results .space").all_text_contents()
        assert kinds[:6] == ["image 1", "text 1", "video 1", "image 2", "text 2", "video 2"]
        assert page.locator("#results li:nth-child(2) .shot.words").count() == 1
        assert (
            page.locator("#results li .sign").count() == 16
            and page.locator("#results li:nth-child(3) .sign").count() == 1
        )
        page.wait_for_function("document.querySelector('li:nth-child(3) img').naturalWidth === 32")
        page.click("button.hit >> nth=1")  # a text
        page.wait_for_selector("#one[open]")
        assert page.is_hidden("#one-picture") and page.inner_text("#one-none") == page.inner_text("#one-title")
        page.keyboard.press("ArrowRight")  # a clip
        page.wait_for_function("document.querySelector('#one-picture').naturalWidth === 32")
        assert page.is_hidden("#one-none")
        page.keyboard.press("ArrowLeft")
        page.click("#one-add")  # a text as an example: a chip without a picture
        page.wait_for_selector(".chip.plus")
        assert page.locator(".chip.plus img").count() == 0
        page.reload()  # by its id alone
        page.wait_for_selector(".chip.plus")
        page.wait_for_selector("#status:has-text(' ms')")
        page.click("#filters-toggle")
        page.check("input[value='modality=video']")
        page.wait_for_function(
            "[...document.querySelectorAll('#results li')].every((one) => one.querySelector('.sign'))"
        )
        page.click("#map-toggle")
        page.wait_for_selector("#map-note:has-text('149 items')")
        page.wait_for_function(PAINTED)
