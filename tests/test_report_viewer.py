"""The viewer of the report: what it holds, and what it does in a headless Chromium.

The tests in a browser are skipped where there is none.
"""

import base64
import gzip
import io
import re

import nibabel as nib
import numpy as np
import pytest
from browser import CHROMIUM, browser, near
from matplotlib import image as mpl_image
from tiny_maps import LIMIT, VOXEL_MM, maps_of, with_tables

from tf_lesion.cli import report
from tf_lesion.evaluation.results import CENTER, Result
from tf_lesion.files import InputError
from tf_lesion.report import pages, pictures, viewer

LEFT, RIGHT = (-24, -10, 30), (36, -40, 18)  # mm: a large lesion on the left, a small one right
BLOBS = ((LEFT, 14), (RIGHT, 8))
READY = "document.getElementById('viewer').dataset.ready === 'yes'"
SHOWN = ".lesions:not([hidden]) "
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


def _read(folder):
    return Result.read(folder / "P_1_restoration.json")


def _layers(result):
    return {layer["name"]: layer for layer in viewer.viewer(result)["layers"]}


def _image(layer):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(layer["nifti"])))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Folder of maps as older versions wrote them, with a page."""
    folder = maps_of(tmp_path_factory.mktemp("old"), blobs=BLOBS, truth=(LEFT, 14))
    assert report.main(["--results", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """The same with tables, numbers, a check and more volumes."""
    folder = with_tables(maps_of(tmp_path_factory.mktemp("new"), blobs=BLOBS, truth=(LEFT, 14)))
    assert report.main(["--results", str(folder)]) == 0
    return folder


def _rows(folder):
    content = (folder / "report.html").read_text().split("<script")[0]
    rows = re.findall(r"(?s)<tr[^>]*data-lesion.*?</tr>", content)
    return content, [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in rows]


def test_a_page_says_of_a_lesion_what_the_table_knows(new):
    content, rows = _rows(new)
    assert "12 25 % yes" in rows[0]
    assert "region 1 -2" in rows[0]
    assert "-41, 2, 3 0.712 0.300" in rows[0]
    assert "– 3" in rows[1]  # no region
    assert "– – 0.300 12 25 % no" in rows[1]  # no place in MNI space, no peak
    assert len(rows) == 4
    assert "Half of the &lt;brain&gt; is cut." in content
    assert base64.b64encode(b"picture").decode() in content


def test_a_page_of_older_maps_has_no_columns_without_content(old):
    content, rows = _rows(old)
    assert rows[0].endswith("0.300 yes")
    for word in ("region", "MNI.<", "peak", "ventricles", "not<br>examined"):
        assert word not in content.split("How it was made")[0], word


def test_the_viewer_holds_what_there_is(old, new):
    names = ["scan", "restored", "residual", "fpr_0.05", "fpr_0.1", "truth", "brain"]
    assert list(_layers(_read(old))) == names
    more = [*names[:1], "normalized", *names[1:3], "uncertainty", *names[3:]]
    layers = _layers(_read(new))
    assert list(layers) == more
    assert [layers[name]["count"] for name in ("fpr_0.05", "truth")] == [2, 0]


def test_the_volumes_of_the_viewer_are_those_of_the_scan(new):
    result = _read(new)
    layers, window = _layers(result), viewer.grid_of(result, most_voxels=1e9).window
    residual = _image(layers["residual"])
    part = result.residual[window]
    np.testing.assert_allclose(residual.get_fdata(), part, rtol=2**-9, atol=1e-4)
    assert ((residual.get_fdata() > LIMIT) == (part > LIMIT)).all()
    numbers = result.numbers_at("fpr_0.05")[window]
    assert (np.asarray(_image(layers["fpr_0.05"]).dataobj) == numbers).all()
    top = layers["scan"]["to"]
    gray = np.clip(result.scan.data[window], 0, viewer.HEADROOM * top)
    np.testing.assert_allclose(_image(layers["scan"]).get_fdata(), gray, atol=0.004 * top)
    for name, layer in layers.items():
        corner = _image(layer).affine @ [0, 0, 0, 1]
        index = [part.start for part in window]
        assert corner == pytest.approx(result.scan.affine @ [*index, 1]), name


def test_a_large_scan_is_resampled_and_lesions_stay_where_they_are(new):
    result = _read(new)
    whole = viewer.grid_of(result, most_voxels=1e9)
    voxels = np.prod([part.stop - part.start for part in whole.window])
    coarse = viewer.grid_of(result, most_voxels=voxels / 3)
    assert not whole.coarser
    assert coarse.coarser
    places = nib.affines.apply_affine(
        result.scan.affine, np.moveaxis(np.indices(result.brain.shape), 0, -1)
    )
    for axis in range(3):
        found = coarse.sample(places[..., axis])
        assert voxels / 4 < found.size <= voxels / 3
        index = np.moveaxis(np.indices(found.shape), 0, -1)
        wanted = nib.affines.apply_affine(coarse.affine, index)[..., axis]
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_a_page_stays_small(new, monkeypatch):
    result = _read(new)
    size = sum(len(layer["nifti"]) for layer in _layers(result).values())
    monkeypatch.setattr(viewer, "VIEWER_BYTES", size / 2)
    shown = viewer.viewer(result)
    assert sum(len(layer["nifti"]) for layer in shown["layers"]) <= size / 2
    assert shown["coarser"]
    assert "so that the page stays small" in pages.page(result)[0]


def test_a_lesion_is_looked_at_inside_even_if_it_is_hollow(new):
    result = _read(new)
    numbers = np.zeros(result.brain.shape, np.uint16)
    numbers[10:20, 10:20, 12] = 1
    numbers[11:19, 11:19, 12] = 0
    object.__setattr__(result, "numbers_at", lambda point: numbers)
    center = result.scan.affine @ [14.5, 14.5, 12, 1]
    row = {"lesion": 1, **dict(zip(CENTER, center[:3], strict=True))}
    (place,) = viewer.lesion_places(result, "fpr_0.05", [row])
    index = np.linalg.solve(result.scan.affine, [*place, 1])[:3]
    assert numbers[tuple(np.rint(index).astype(int))] == 1


def test_a_table_of_something_else_is_named(tmp_path):
    folder = with_tables(maps_of(tmp_path))
    (folder / "P_1_lesions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"P_1_lesions.csv: expected .* target_fpr.*got a, b"):
        _read(folder).lesions_at("fpr_0.05")
    (folder / "P_1_lesions.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"P_1_lesions\.csv"):
        _read(folder).lesions_at("fpr_0.05")


@pytest.mark.slow
def test_scans_worth_a_look_come_first_in_a_cohort(tmp_path):
    for name, verdict, radius in (
        ("large", "pass", 18),
        ("odd", "look", 10),
        ("small", "pass", 10),
        ("bad", "failed", 6),
    ):
        (tmp_path / name).mkdir()
        maps_of(tmp_path / name, name, blobs=((LEFT, radius),))
        with_tables(tmp_path / name, name, verdict=verdict)
    (tmp_path / "older").mkdir()
    maps_of(tmp_path / "older", "older", blobs=((LEFT, 14),))
    assert report.main(["--results", str(tmp_path)]) == 0
    content = (tmp_path / "index.html").read_text()
    links = re.findall(r'href="(\w+)\.html"', content)
    assert links == ["bad", "odd", "large", "older", "small"]
    assert content.count("Half of the &lt;brain&gt; is cut.") == 2
    assert "worth a look" in content
    assert "None" not in content


def test_a_lesion_on_the_left_is_on_the_right_of_the_slices(old):
    result = _read(old)
    z = int(np.rint(np.linalg.solve(result.scan.affine, [*LEFT, 1])[2]))
    figure = pictures.montage_figure(result, np.array([z]))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    box = figure.axes[0].get_window_extent()
    picture = mpl_image.imread(io.BytesIO(buffer.getvalue()))[..., :3]
    yellow = np.flatnonzero(near(picture, pictures.MASK_COLOR).any(axis=0))
    assert yellow.size
    assert yellow.min() > (box.x0 + box.x1) / 2


@pytest.fixture
def page(tmp_path):
    """A `browser.Page`; at the end it must have logged no error and fetched nothing."""
    with browser(tmp_path / "profile") as page:
        yield page
        assert page.errors == []
        assert {url.split(":")[0] for url in page.requests} <= {"file", "data", "blob"}


def _open(page, folder, **window):
    page.open(folder / "report.html", **window)
    page.wait(READY)


def _text(page, name):
    return page.run(f"document.getElementById('{name}').textContent")


def _place(page):
    return np.array(re.findall(r"-?\d+", _text(page, "place"))[:3], float)


def _drawn(page, layers):
    page.wait(f"document.getElementById('viewer').dataset.drawn === '{layers}'")


@needs_browser
def test_the_viewer_outlines_and_colors_a_left_lesion_on_the_right(page, old):
    _open(page, old)
    page.click("input[name=view][value='0'] + span")
    for key, color, layers in (
        ("1", pictures.MASK_COLOR, "scan fpr_0.05"),
        ("c", "#ffedb8", "scan residual fpr_0.05"),  # the last colors, over the outline
    ):
        page.key(key)
        _drawn(page, layers)
        picture = page.pixels("#viewer canvas")
        rows, columns = np.nonzero(near(picture, color, within=0.3) & (np.ptp(picture, -1) > 0.15))
        assert len(columns) > 50, key
        assert columns.min() > picture.shape[1] / 2, key  # right on the screen
        assert rows.max() - rows.min() < picture.shape[0] / 2, key
    page.key("0")
    page.key("c")
    _drawn(page, "scan")
    assert not (near(page.pixels("#viewer canvas"), pictures.MASK_COLOR)).any()


@needs_browser
@pytest.mark.parametrize("folder", ["old", "new"])
def test_a_click_on_a_row_goes_to_its_lesion(page, request, folder):
    _open(page, request.getfixturevalue(folder))
    row = f"{SHOWN}tr[data-lesion='2']"
    page.click(f"{row} td:nth-child(2)")
    place = page.run(f'document.querySelector("{row}").dataset.mm').split()
    assert _place(page) == pytest.approx([float(mm) for mm in place], abs=0.51)
    assert [float(mm) for mm in place] == pytest.approx(RIGHT, abs=4)
    assert "residual 0.3" in _text(page, "place")
    assert _text(page, "lesion-said").startswith("2 of 2")
    assert page.run(f"document.querySelector(\"{row}\").classList.contains('at')")


@needs_browser
def test_a_click_in_the_viewer_marks_the_row_of_the_lesion(page, new):
    _open(page, new)
    page.key("n")
    assert page.run(f"document.querySelector('{SHOWN}tr.at').dataset.lesion") == "2"
    green = near(page.pixels("#viewer canvas"), "#5dff5d")
    assert green.any()
    page.key("p")
    page.click("input[name=view][value='0'] + span")
    yellow = near(page.pixels("#viewer canvas"), "#5dff5d")
    rows, columns = np.nonzero(yellow)
    assert rows.size, "the lesion that was gone to is green"
    page.key("n")
    at = (columns.mean() / yellow.shape[1], rows.mean() / yellow.shape[0])
    for _ in range(3):  # back to the slice of the first
        page.click("#viewer canvas", at=at)
        page.key("PageUp")
    page.click("#viewer canvas", at=at)
    assert page.run(f"document.querySelector('{SHOWN}tr.at').dataset.lesion") == "1"


@needs_browser
def test_keys_switch_layers_threshold_and_slices(page, old):
    _open(page, old)
    _drawn(page, "scan fpr_0.05")
    for key, layers in (("2", "scan fpr_0.1"), ("b", "restored fpr_0.1"), ("c", None)):
        page.key(key)
        _drawn(page, layers or "restored residual fpr_0.1")
    assert page.run("document.querySelector('.lesions:not([hidden])').dataset.point") == "fpr_0.1"
    assert "(10 % threshold)" in _text(page, "threshold-said")
    page.key(".")
    assert float(_text(page, "threshold-said")) == pytest.approx(1.1 * LIMIT / 2, rel=0.01)
    page.key("[")
    assert _text(page, "opacity-said") == "50 %"
    page.key(" ", kinds=("keyDown",))
    _drawn(page, "restored")
    page.key(" ", kinds=("keyUp",))
    _drawn(page, "restored residual fpr_0.1")
    page.click("#viewer canvas", at=(0.15, 0.5))
    page.key("PageUp")  # to the center of a voxel
    for axis, key in enumerate(("ArrowLeft", "ArrowUp", "PageUp")):
        before = _place(page)
        page.key(key)
        moved = [0, 0, 0]
        moved[axis] = VOXEL_MM
        assert _place(page) - before == pytest.approx(moved, abs=1), key


@needs_browser
def test_a_page_fits_a_phone(page, old):
    _open(page, old, width=375, height=812, phone=True)
    assert page.run("document.documentElement.scrollWidth") == 375
    assert page.run("document.getElementById('viewer').dataset.view") == "axial"
    assert page.run("document.querySelector('#viewer canvas').clientHeight") < 812 * 0.8


@needs_browser
def test_the_printed_page_is_two_pages_at_most_without_the_viewer(page, new):
    _open(page, new)
    page.key("2")  # another threshold than the one of the report
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", page.pdf())) <= 2
    page.call("Emulation.setEmulatedMedia", media="print")
    display = "[...document.querySelectorAll('{}')].map(e => e.offsetHeight > 0)"
    assert set(page.run(display.format("#viewer, .lesions:not(.chosen)"))) == {False}
    assert set(page.run(display.format(".lesions.chosen, .montage, .settings, .qc"))) == {True}


@needs_browser
def test_without_webgl_the_page_says_so(tmp_path, old):
    with browser(tmp_path / "profile", webgl=False) as page:
        page.open(old / "report.html")
        assert "no WebGL 2" in _text(page, "no-viewer")
        assert page.run("document.querySelector('#viewer canvas').offsetHeight") == 0
        assert page.run("document.querySelector('.montage img').naturalWidth") > 500
        assert page.errors == []


@needs_browser
def test_the_table_of_a_cohort_opens_and_sorts(page, tmp_path):
    for name, radius in (("a", 8), ("b", 14)):
        (tmp_path / "maps" / name).mkdir(parents=True)
        maps_of(tmp_path / "maps" / name, name, blobs=((LEFT, radius),))
    assert report.main(["--results", str(tmp_path / "maps")]) == 0
    page.open(tmp_path / "maps" / "index.html")
    names = "[...document.querySelectorAll('#subjects tbody tr')].map(r => r.cells[0].innerText)"
    assert page.run(names) == ["b", "a"]
    page.click("#subjects th button")
    page.click("#subjects th button")
    assert page.run(names) == ["a", "b"]
