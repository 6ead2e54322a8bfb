"""The report as people meet it: opened from disk in a real browser, clicked, sorted, scrolled, on a phone and in the dark."""

from dataclasses import replace

import numpy as np
import pytest
from browser_helpers import missing_browser, prefer, requested, resize, wait
from report_helpers import NASTY, STEPS, make_images, make_report, make_table

from crfrefine.errors import InputError
from crfrefine.pages.report import CaseImages, missing_viewer, write_report
from crfrefine.pages.report.cutting import upright_case
from crfrefine.pages.report.pairs import choose_cases
from crfrefine.statistics.comparison import ResultTable

pytestmark = pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "there is a browser")
needs_viewer = pytest.mark.skipif(bool(missing_viewer()), reason=missing_viewer() or "there is a viewer")
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}

# Text that lies on pictures: it is white with a black edge.
ON_PICTURES = ".picture .letter, .cut text"

CONTRASTS = """
const parse = (color) => { const found = color.match(/[\\d.]+/g).map(Number); return found.length > 3 ? found : [...found, 1]; };
const luminance = (color) => { const [r, g, b] = color.slice(0, 3).map((value) => {
  const share = value / 255; return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const background = (node) => { for (; node; node = node.parentElement) {
  const color = parse(getComputedStyle(node).backgroundColor); if (color[3] === 1) return color; } return [255, 255, 255, 1]; };
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, node = text.parentElement;
  if (!text.data.trim() || node.closest(arguments[0]) || !node.checkVisibility() || node.closest("title, desc")) continue;
  const style = getComputedStyle(node), ink = parse(node.closest("svg") ? style.fill : style.color);
  const [one, other] = [luminance(ink), luminance(background(node))];
  found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), text.data.trim().slice(0, 40)]);
}
return found;
"""

OVERFLOWING = """
const wide = document.documentElement.clientWidth;
return [...document.body.querySelectorAll("*")].filter((node) => node.checkVisibility() && !node.closest(".scroll table, .sr, .skip")
  && node.getBoundingClientRect().right > wide + 0.5).map((node) => node.outerHTML.slice(0, 120));
"""


INSIDE = """
const [plane, rows, columns] = arguments, context = document.createElement("canvas").getContext("2d");
const drawn = document.querySelectorAll(`#case-0 .plane[data-plane=${plane}] svg path`);
const paths = [...drawn].map((path) => new Path2D(path.getAttribute("d")));
const around = (x, y) => paths.findIndex((path) => context.isPointInPath(path, x + 0.5, y + 0.5, "evenodd"));
return Array.from({length: rows}, (_, y) => Array.from({length: columns}, (_, x) => around(x, y) + 1));
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_report(), num_shown=1)
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    """The report, freshly opened at desk width; whatever it complains about on the console fails the test."""
    prefer(browser, "light")
    resize(browser, 1200)
    browser.get_log("browser")
    browser.get(address)
    wait(browser, "document.readyState === 'complete' && document.querySelector('#case-table tbody tr')")
    yield browser
    assert browser.get_log("browser") == []


def find(driver, selector):
    return driver.find_element("css selector", selector)


def column(driver, place):
    return driver.execute_script(
        "return [...document.querySelectorAll('#case-table tbody tr')].map((row) => row.cells[arguments[0]].textContent)", place
    )


def select(driver, selector, value):
    driver.execute_script(
        "const node = document.querySelector(arguments[0]); node.value = arguments[1]; node.dispatchEvent(new Event('input'))",
        selector,
        value,
    )


def number(text):
    return float(text.replace("\u2212", "-"))


def open_other(browser, tmp_path, report, **options):
    """Open another report than that of the tests' page."""
    write_report(tmp_path / "report.html", report, **options)
    browser.get_log("browser")
    browser.get((tmp_path / "report.html").as_uri())
    wait(browser, "document.readyState === 'complete'")


def open_viewer(page, case=0):
    page.execute_script(f"document.querySelector('#case-{case} details.viewer').open = true")
    wait(page, f"document.querySelector('#case-{case} details.viewer').dataset.ready")


def pixels(page, plane):
    """The canvas of a plane, (rows, columns, RGBA); read from a copy, as the page itself never reads it back."""
    flat, width = page.execute_script(
        "const canvas = document.querySelector(`#case-0 .plane[data-plane=${arguments[0]}] canvas`);"
        "const copy = Object.assign(document.createElement('canvas'), {width: canvas.width, height: canvas.height});"
        "const context = copy.getContext('2d', {willReadFrequently: true});"
        "context.drawImage(canvas, 0, 0);"
        "return [Array.from(context.getImageData(0, 0, copy.width, copy.height).data), copy.width]",
        plane,
    )
    return np.array(flat).reshape(-1, width, 4)


def toggle(page, name):
    page.execute_script("document.querySelector(`#case-0 input[name=${arguments[0]}]`).click()", name)


def move_to(page, plane, place):
    select(page, f"#case-0 .plane[data-plane={plane}] input", str(place + 1))


def bare(page):
    """Open the viewer without any overlay."""
    open_viewer(page)
    for name in ("reference", "changes"):
        toggle(page, name)


def values_of(page, *names):
    return [float(page.execute_script("return document.querySelector(`#case-0 [name=${arguments[0]}]`).value", name)) for name in names]


def two_modalities(case):
    """A second modality whose intensities run the other way, and a far change that needs a plane of its own."""
    reference = np.zeros((40, 30, 12), np.uint8)
    reference[4:16, 5:20, 2:10] = 1
    before = reference.copy()
    before[32:36, 22:26, 10:12] = 2
    clear = np.random.default_rng(7).normal(100, 8, reference.shape) + 60 * (reference > 0)
    images = np.stack([-0.01 * clear + np.random.default_rng(8).normal(0, 0.5, reference.shape), clear]).astype(np.float32)
    images[1, 4, 4, 1] = 900  # far outside of the window
    return CaseImages(case, images, reference, before, reference, np.diag([-1.0, -1.5, 3.0, 1.0]), ("T1", "FLAIR"))


def flat(case):
    labels = np.pad(np.ones((6, 5, 1), np.uint8), ((4, 4), (4, 4), (0, 0)))
    intensities = np.where(labels[None] > 0, 60, -1000).astype(np.float32)
    return CaseImages(case, intensities, labels, labels, np.roll(labels, 1, 0), np.diag([1.0, 1.0, 5.0, 1.0]))


def place_of(page, *planes):
    slider = "#case-0 .plane[data-plane={}] input"
    return [int(find(page, slider.format(plane)).get_attribute("value")) - 1 for plane in planes]


def box_of(page, selector):
    return page.execute_script(
        f"return document.querySelector('#case-0 .plane[data-plane=axial] {selector}').getBoundingClientRect().toJSON()"
    )


def test_it_asks_for_nothing_and_tables_and_charts_obey(page, address):
    from selenium.webdriver.common.keys import Keys

    requested(page)
    page.refresh()
    wait(page, "document.readyState === 'complete'")
    assert {url.partition("#")[0] for url in requested(page) if not url.startswith("data:")} == {address}
    assert page.execute_script("return document.querySelectorAll('b, [onerror]').length") == 0
    assert make_report().verdict.sentence == find(page, "#sentence").text
    assert page.execute_script("return document.querySelector('#sentence').getBoundingClientRect().bottom") < 400, "the verdict comes first"

    def charts():
        return page.execute_script(
            "return [...document.querySelectorAll('.chart-set')].filter((set) => set.checkVisibility())"
            ".map((set) => [set.dataset.metric, set.dataset.region])"
        )

    assert charts() == [["dice", "mean"]]
    find(page, "#tab-hd95_mm").click()
    assert charts() == [["hd95_mm", "mean"]]
    assert find(page, "#tab-hd95_mm").get_attribute("aria-selected") == "true"
    select(page, "#region", "2")
    assert charts() == [["hd95_mm", "2"]]
    chosen = "return ['#table-metric', '#table-region'].map((name) => document.querySelector(name).value)"
    assert page.execute_script(chosen) == ["hd95_mm", "2"], "the table goes with the charts"

    expected = np.abs(make_report().table.values("network", "2", "hd95_mm"))
    for direction in ("ascending", "descending"):
        find(page, "#case-table th:nth-child(2) button").click()
        assert find(page, "#case-table th:nth-child(2)").get_attribute("aria-sort") == direction
        shown = column(page, 1)
        assert shown[-2:] == ["–", "–"], "two are undefined"
        numbers = [number(text) for text in shown[:-2]]
        assert numbers == sorted(numbers, reverse=direction == "descending")
        np.testing.assert_allclose(sorted(numbers), np.sort(expected)[:-2], atol=0.0051)  # two decimals are shown
    find(page, "#case-table th:nth-child(4) button").click()
    differences = [number(text) for text in column(page, 3)[:-2]]
    assert differences == sorted(differences)
    assert differences[0] < 0, "a sign is no letter"
    assert len(set(differences)) > 5
    assert [find(page, f"#case-table th:nth-child({place})").get_attribute("aria-sort") for place in (1, 3)] == ["none", "none"]

    find(page, "#tab-hd95_mm").send_keys(Keys.HOME)
    assert charts() == [["dice", "2"]], "the region stays"
    find(page, "#tab-dice").send_keys(Keys.ARROW_LEFT)
    assert charts()[0][0] == page.execute_script("return document.activeElement.dataset.metric") != "dice"
    find(page, "#tab-dice").click()
    select(page, "#region", "mean")
    find(page, "#case-table th:first-child button").send_keys(Keys.ENTER)
    names = column(page, 0)
    plain = [name for name in names if name.startswith("case ")]
    assert plain == sorted(plain, key=lambda name: int(name.split()[1]))
    assert NASTY in names
    assert page.execute_script("return document.activeElement.dataset.key") == "case", "the focus stays where it was"
    for _ in range(2):
        find(page, "#case-table th:nth-child(5) button").send_keys(Keys.ENTER)
        better = [name for name, result in zip(column(page, 0), column(page, 4), strict=True) if result == "▲ better"]
        assert better == [name for name in names if name in better], "equal ones stand in the order of names"
        assert len(better) > 5

    find(page, "#filter").send_keys("CASE 1")
    assert sorted(column(page, 0)) == ["case 10", "case 11", "case 12"]
    assert find(page, "#table-status").text == "3 of 13 cases"
    find(page, "#filter").clear()
    select(page, "#filter", "")
    gains = {"better": 0, "worse": 0, "equal": 0}
    for kind in gains:
        select(page, "#kind", kind)
        gains[kind] = len(column(page, 0))
        assert all(text.endswith(kind) for text in column(page, 4))
    comparison = make_report().verdict.comparison
    assert gains == {"better": comparison.wins, "worse": comparison.losses, "equal": comparison.ties}
    select(page, "#kind", "undefined")
    assert column(page, 0) == []
    select(page, "#kind", "better")

    rows = "return [...document.querySelector('table.summary').tBodies[0].rows].filter((row) => row.checkVisibility()).length"
    few = page.execute_script(rows)
    find(page, "#all-regions").click()
    assert page.execute_script(rows) > few
    link = find(page, "#case-table tbody a")
    name = link.text
    link.click()
    assert page.execute_script("return document.querySelector(':target h4').textContent").startswith(name)

    put_in = "const node = document.createElement('script'); node.textContent = 'window.isOpen = 1'; document.body.append(node);"
    assert page.execute_script(f"{put_in} return window.isOpen ?? 0") == 0, "a script that is not the page's own does not run"
    (complaint,) = page.get_log("browser")
    assert "Content Security Policy" in complaint["message"]


@needs_viewer
def test_the_viewer_shows_slices_overlays_and_outlines_of_the_case(page):
    """Pixel by pixel the gray values of the volume, turned so that the patient's right is at the left."""
    case = upright_case(make_images("a"))
    bare(page)
    size = [count * step for count, step in zip(case.after.shape, STEPS, strict=True)]
    for plane, (through, across, up) in PLANES.items():
        for place in (0, case.after.shape[through] - 1, case.point[through]):
            move_to(page, plane, place)
            cut = np.take(case.gray, place, axis=through).T[::-1]
            shown = pixels(page, plane)
            assert shown.shape[:2] == (case.after.shape[up], case.after.shape[across])
            assert (shown[..., 3] == 255).all()
            # The viewer's gray values have 64 levels.
            assert np.abs(shown[..., :3] - cut[..., None].astype(int)).max() < 4
            assert shown[..., 0].std() > 10, "not blank"
            figure, axis = find(page, f"#case-0 .plane[data-plane={plane}]"), case.axes[through]
            counted = f"{axis.first + axis.step * place} of {axis.size}"
            assert figure.find_element("css selector", "output").text == counted
            assert figure.find_element("css selector", "input").get_attribute("aria-valuetext") == counted
        picture = figure.find_element("css selector", ".picture")
        assert picture.size["width"] / picture.size["height"] == pytest.approx(size[across] / size[up], rel=0.02)  # whole pixels
        middles = {
            letter.text: (letter.location["x"] + letter.size["width"] / 2, letter.location["y"] + letter.size["height"] / 2)
            for letter in picture.find_elements("css selector", ".letter")
        }
        sides = ("RL", "PA", "IS")
        assert middles[sides[across][0]][0] < middles[sides[across][1]][0]
        assert middles[sides[up][0]][1] > middles[sides[up][1]][1], "y runs downward"

    for overlay in ("reference", "before", "after"):
        toggle(page, overlay)
        for plane, (through, _, _) in PLANES.items():
            for place in (int(np.argwhere(case.after == 2)[0][through]), case.point[through]):
                move_to(page, plane, place)
                cut = np.take(getattr(case, overlay), place, axis=through).T[::-1]
                _, first, which = np.unique(cut, return_index=True, return_inverse=True)
                paths = np.argsort(np.argsort(first))[which]  # one per label, in the order in which rows meet them; background is first
                np.testing.assert_array_equal(page.execute_script(INSIDE, plane, *cut.shape), paths.reshape(cut.shape))
        toggle(page, overlay)
    assert box_of(page, "svg") == box_of(page, "canvas"), "it lies on the picture"

    toggle(page, "filled")
    plain = {plane: pixels(page, plane) for plane in PLANES}
    for overlay in ("reference", "before", "changes", "after"):
        toggle(page, overlay)
        volume = getattr(case, overlay)
        for plane, (through, _, _) in PLANES.items():
            expected = np.take(volume, case.point[through], axis=through).T[::-1] > 0
            np.testing.assert_array_equal((pixels(page, plane) != plain[plane]).any(axis=-1), expected)
            assert expected.any()
        if overlay != "after":
            toggle(page, overlay)
    right, front, top = np.argwhere(case.after == 2)[0]
    for plane, place in (("axial", top), ("coronal", front), ("sagittal", right)):
        move_to(page, plane, int(place))
    rows, columns = np.nonzero(pixels(page, "axial")[..., 2] > pixels(page, "axial")[..., 0] + 20)  # the second label is blue
    assert (rows.tolist(), columns.tolist()) == ([case.after.shape[1] - 1 - front], [right])


@pytest.mark.long
@needs_viewer
def test_modalities_windows_pointer_wheel_and_zoom_change_the_picture(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page, case, (first, *_) = browser, upright_case(two_modalities("a")), choose_cases(make_report(3), 1)
    resize(page, 1200)
    open_other(
        page, tmp_path, make_report(3, load_case=lambda name: two_modalities(name) if name == first.case else flat(name)), num_shown=1
    )
    bare(page)
    assert values_of(page, "modality") == [1], "the one with the clearest border comes first"
    for number, name in enumerate(("T1", "FLAIR")):
        select(page, "#case-0 select[name=modality]", str(number))
        assert find(page, f"#case-0 select[name=modality] option:nth-child({number + 1})").text == name
        expected = case.windows[number].gray(case.images[number])[:, :, case.point[2]].T[::-1].astype(int)
        # The viewer's gray values have 64 levels; their distance is 4.05 of 255, and rounding adds 0.5 on both sides.
        assert np.abs(pixels(page, "axial")[..., 0] - expected).max() <= 3
    select(page, "#case-0 input[name=level]", "150")
    select(page, "#case-0 input[name=width]", "40")
    image, shown = case.images[1][:, :, case.point[2]].T[::-1], pixels(page, "axial")[..., 0]
    assert (shown[image < 127] == 0).all()
    assert (shown[image > 173] == 255).all()
    low, high = case.windows[1].low, case.windows[1].high
    within = (image > 135) & (image < 165)
    # At most half of a stored level away, in shades: 255 for 40.
    assert np.abs(shown - 255 * (image - 130) / 40)[within].max() <= 255 * (high - low) / 63 / 2 / 40 + 0.5
    assert page.execute_script("return Number(document.querySelector('#case-0 [name=level]').max)") == 900, "the brightest voxel"
    to_structure, to_change, reset = page.find_elements("css selector", "#case-0 .view button")
    reset.click()
    np.testing.assert_allclose(values_of(page, "level", "width"), [(low + high) / 2, high - low], rtol=1e-6)

    # The wheel turns slices, and with Ctrl it zooms; a click moves the other planes, and a drag with Shift the window.
    picture = find(page, "#case-0 .plane[data-plane=axial] .picture")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    turn = "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: 100, cancelable: true, ctrlKey: arguments[1]}))"
    page.execute_script(turn, picture, False)
    assert place_of(page, "axial") == [case.point[2] - 1], "down is inferior"
    ActionChains(page).move_to_element_with_offset(picture, picture.size["width"] // 4, -picture.size["height"] // 4).click().perform()
    found = place_of(page, "sagittal", "coronal")
    assert found == pytest.approx([0.75 * size for size in case.after.shape[:2]], abs=2), "left and front of the patient"
    level, width = values_of(page, "level", "width")
    drag = ActionChains(page, duration=10).key_down(Keys.SHIFT).click_and_hold(picture)
    drag.move_by_offset(40, -30).release().key_up(Keys.SHIFT).perform()
    assert values_of(page, "level")[0] < level, "up is brighter"
    assert values_of(page, "width")[0] > width, "right is softer"
    reset.click()
    assert place_of(page, "sagittal", "coronal", "axial") == list(case.point)
    whole = box_of(page, ".picture")
    select(page, "#case-0 input[name=zoom]", "3")
    zoomed, share = box_of(page, ".content"), (case.point[0] + 0.5) / case.after.shape[0]
    assert box_of(page, ".picture") == whole, "the frame stays"
    assert (zoomed["width"], zoomed["height"]) == pytest.approx((3 * whole["width"], 3 * whole["height"]), rel=1e-3)
    places = [area["x"] + share * area["width"] for area in (zoomed, whole)]
    assert places[0] == pytest.approx(places[1], abs=0.15 * whole["width"]), "the chosen voxel stays about where it was"
    page.execute_script(turn, picture, True)
    assert values_of(page, "zoom") == [2.5], "the slider has steps of a quarter"
    to_change.click()
    assert place_of(page, "sagittal", "coronal", "axial") == list(case.change)
    frame, content = box_of(page, ".picture"), box_of(page, ".content")
    assert frame["left"] < content["x"] + (case.change[0] + 0.5) / case.after.shape[0] * content["width"] < frame["right"]
    to_structure.click()
    assert place_of(page, "sagittal", "coronal", "axial") == list(case.point)

    toggle(page, "filled")
    shades = [pixels(page, "axial")]
    for opacity in ("20", "90"):
        select(page, "#case-0 input[name=opacity]", opacity)
        if len(shades) == 1:
            toggle(page, "reference")
        page.execute_script("document.querySelector('#case-0 fieldset').dispatchEvent(new Event('input'))")
        shades.append(pixels(page, "axial"))
    assert np.abs(shades[2] - shades[0]).sum() > np.abs(shades[1] - shades[0]).sum() > 0

    # A slice of CT has one plane, and the usual windows.
    open_viewer(page, 1)
    planes = "return [...document.querySelectorAll('#case-1 .plane')].filter((plane) => plane.checkVisibility())"
    assert page.execute_script(f"{planes}.map((plane) => plane.dataset.plane)") == ["axial"]
    options = "return [...document.querySelector('#case-1 select[name=window]').options].map((one) => one.text)"
    assert page.execute_script(options) == ["soft tissue", "lung", "bone"]
    select(page, "#case-1 select[name=window]", "1")
    chosen = "return ['level', 'width'].map((name) => Number(document.querySelector(`#case-1 [name=${name}]`).value))"
    assert page.execute_script(chosen) == [-600, 1500]

    page.execute_script("document.querySelector('#case-1 details.viewer').open = false")
    wait(page, "!document.querySelector('#case-1 details.viewer').dataset.ready")
    assert page.execute_script("return document.querySelectorAll('#case-1 details.viewer canvas').length") == 0
    page.execute_script("brainsprite = () => { throw new Error('no canvas'); }")
    page.execute_script("document.querySelector('#case-1 details.viewer').open = true")
    wait(page, "document.querySelector('#case-1 .planes').textContent === 'The viewer cannot be shown here: no canvas'")
    assert page.get_log("browser") == []


@pytest.mark.long
def test_text_can_be_read_in_the_dark_and_in_the_light_and_on_white_paper(page):
    """4.5 is what WCAG 2.2 asks for, level AA."""
    prefer(page, "dark")
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen = []
    for _ in range(2):
        seen.append(page.execute_script(paper))
        page.execute_script("document.querySelectorAll('.chart-set').forEach((set) => { set.hidden = false; })")
        page.execute_script("document.querySelectorAll('details:not(.viewer)').forEach((node) => { node.open = true; })")
        contrasts = page.execute_script(CONTRASTS, ON_PICTURES)
        assert len(contrasts) > 500
        assert [text for contrast, text in contrasts if contrast < 4.5] == []
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        printed = page.execute_script(paper), page.execute_script(CONTRASTS, ON_PICTURES)
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        prefer(page, "dark")
        assert printed[0] == "rgb(255, 255, 255)"
        assert [text for contrast, text in printed[1] if contrast < 4.5] == []
        # The page hears of the system's preference with the next frame.
        wait(page, f"document.querySelector('#theme').textContent === '{'Dark' if seen[1:] else 'Light'} theme'")
        find(page, "#theme").click()
    assert seen[0] != seen[1], "the button turns the theme around"
    assert page.execute_script(paper) == seen[0]


@pytest.mark.long
def test_nothing_is_wider_than_the_screen(page):
    hints = "[...document.querySelectorAll('.more-columns')]"
    wait(page, f"!{hints}.some((hint) => hint.checkVisibility())")
    case = upright_case(make_images("a"))
    size = [count * step for count, step in zip(case.after.shape, case.steps, strict=True)]
    boxes = page.execute_script(
        "return [...document.querySelectorAll('#case-0 .cut-row')].map((row) => row.querySelector('image').getBoundingClientRect())"
        ".map((box) => box.width / box.height)"
    )
    # A hundredth of a pixel is what layout rounds to.
    assert boxes == pytest.approx([size[0] / size[1], size[0] / size[2], size[1] / size[2]], rel=0.01)
    page.execute_script("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    if not missing_viewer():
        wait(page, "[...document.querySelectorAll('details.viewer')].every((box) => box.dataset.ready)")
    for width in (1200, 360):
        resize(page, width)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script(OVERFLOWING) == []
        widths = "return [...document.querySelectorAll('.chart')].filter((node) => node.checkVisibility()).map((node) => node.clientWidth)"
        assert min(page.execute_script(widths)) > 280, "drawn for 360: its texts are at least three quarters of their size"
    wait(page, "document.querySelector('#summary .more-columns').checkVisibility()")
    assert find(page, "#summary .more-columns").text == "Scroll sideways for more columns →"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not any(page.execute_script(f"return {hints}.map((hint) => hint.checkVisibility())"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})

    # What a row is about stays in sight while a table is scrolled: metric and region side by side, and all of the caption.
    page.execute_script("document.querySelectorAll('.scroll').forEach((box) => { box.scrollLeft = box.scrollWidth; })")
    spans = page.execute_script(
        "return [...document.querySelectorAll('.summary, .declines table')].map((table) => [table.parentElement, table.caption,"
        " ...[...table.querySelectorAll('tr:not(:has([colspan]))')].filter((row) => row.checkVisibility())"
        ".flatMap((row) => [row.cells[0], row.cells[1]])]"
        ".map((node) => { const box = node.getBoundingClientRect(); return [box.left, box.right]; }))"
    )
    assert len(spans) >= 2
    for box, caption, *cells in spans:
        assert box[0] <= caption[0] < caption[1] <= box[1]
        for metric, region in zip(cells[::2], cells[1::2], strict=True):
            assert box[0] <= metric[0] < metric[1] <= region[0] + 1 < region[1] <= box[1] - 90, "there is room for numbers"


@pytest.mark.long
def test_without_scripts_every_chart_is_there_and_nothing_that_is_dead(page, address):
    """As in a mail program or behind a policy that forbids scripts, where <noscript> may not be heeded."""
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(address)
        wait(page, "document.readyState === 'complete'")  # scripts of the page are off, not those of the test
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    shown = "return [...document.querySelectorAll(arguments[0])].map((node) => node.checkVisibility())"
    assert page.execute_script(shown, ".chart-set") == 9 * [True]
    assert set(page.execute_script(shown, "button, select, input, details.viewer")) == {False}
    assert page.execute_script(shown, ".needs-no-script") == [True]
    page.get(address)
    assert page.execute_script(shown, ".needs-no-script") == [False]
    assert True in page.execute_script(shown, "button, select, input")


@pytest.mark.long
def test_names_of_any_length_and_direction_stay_in_their_places_and_a_long_table_is_shown_on_demand(browser, tmp_path):
    """On a phone, without any picture."""

    def load(case):
        raise InputError(f"{case}: cut off")

    lines = (replace(line, case=f"\u202e{line.case}" if line.case != "case 3" else 200 * "x") for line in make_table(60))
    titles = {"1": 200 * "y", "2": "<script>alert(2)</script>"}
    resize(browser, 360)
    open_other(browser, tmp_path, make_report(3, table=ResultTable(lines), region_titles=titles, load_case=load), num_shown=6)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert browser.execute_script(OVERFLOWING) == []
    isolated = "return [...document.querySelectorAll('h4')].map((name) => getComputedStyle(name.firstElementChild).unicodeBidi)"
    assert set(browser.execute_script(isolated)) == {"isolate"}, "a name from right to left does not turn around what follows it"
    assert len(column(browser, 0)) == 50
    assert find(browser, "#table-status").text == "60 of 60 cases, the first 50 shown"
    find(browser, "#more").click()
    assert len(column(browser, 0)) == 60
    assert not find(browser, "#more").is_displayed()
    assert browser.get_log("browser") == []
