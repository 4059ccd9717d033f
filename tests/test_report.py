"""The report: one file that needs no other, whose numbers are those of the maps."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nibabel as nib
import numpy as np
import pytest
import tiny_scans

from tf_lesion.cli import report
from tf_lesion.evaluation.measure import measure
from tf_lesion.evaluation.results import Result
from tf_lesion.report import pages, pictures

LIMIT = 0.15
AFFINE_ML = (tiny_scans.VOXEL_MM / 10) ** 3
FETCHING = {"src", "href", "data", "action", "poster", "srcset"}


class _Addresses(HTMLParser):
    """Everything a page would fetch, the page inside its frame included."""

    def __init__(self, text):
        super().__init__()
        self.found, self.frames, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(value)
            elif name in FETCHING and not value.startswith("data:"):
                self.found.append(value)
            elif name == "srcdoc":
                self.frames.append(value)


def _results(folder, name="P_1", *, blobs=(((-20, -10, 30), 14),), truth=None, **changes):
    """Maps and JSON as restore_brats.py writes them: a brain, and a residual in balls."""
    values, affine = tiny_scans.brain()
    brain = values > 0
    residual = np.where(brain, 0.02 + 0.05 * values / values.max(), 0)
    for center, radius in blobs:
        residual[tiny_scans.blob(affine, values.shape, center, radius) & brain] = 0.3
    mask = residual > LIMIT
    scan = tiny_scans.write(folder / f"{name}_t2.nii.gz", values.astype(np.int16), affine)
    maps = {"restored": 0.5 * brain, "residual": residual, "fpr_0.05": mask.astype(np.uint8)}
    maps["fpr_0.1"] = (residual > LIMIT / 2).astype(np.uint8)
    for key, volume in maps.items():
        volume = volume if volume.dtype == np.uint8 else volume.astype(np.float32)
        tiny_scans.write(folder / f"{name}_{key}.nii.gz", volume, affine)
    if truth is not None:
        label = tiny_scans.blob(affine, values.shape, *truth) & brain
        tiny_scans.write(folder / f"{name}_seg.nii.gz", label.astype(np.uint8), affine)
    at = {"count": len(blobs), "volume_ml": mask.sum() * AFFINE_ML, "largest_ml": 1.0}
    at |= {"largest_center_mm": [0, 0, 0], "threshold": LIMIT}
    facts = {
        "name": name,
        "command": "restore_brats.py --input x",
        "tf_lesion_version": "0.1.0",
        "commit": None,
        "versions": dict.fromkeys(pages.VERSION_NAMES, "1.2.3"),
        "input": str(scan),
        "model": "gmvae",
        "model_path": "runs/gmvae",
        "model_identity": "0123456789ab",
        "precision": "float32",
        "seed": 7,
        "steps": 150,
        "tv_weight": 1.8,
        "slice_step": 1,
        "slices_restored": 30,
        "scan_settings": {"align": "rigid"},
        "scan": {"shape": list(values.shape), "voxel_sizes_mm": [4, 4, 4], "orientation": "RAS"},
        "brain_ml": brain.sum() * AFFINE_ML,
        "examined_fraction": 0.987,
        "mutual_information": 0.5,
        "atlas_overlap": 0.9,
        "histogram_distance": None,
        "lesions": {
            "fpr_0.05": {"target_fpr": 0.05, "healthy_fpr": 0.0499, **at},
            "fpr_0.1": {"target_fpr": 0.1, "healthy_fpr": 0.0998, **at, "threshold": LIMIT / 2},
        },
        "warnings": [],
        "truth": None if truth is None else str(folder / f"{name}_seg.nii.gz"),
        "files": {key: f"{name}_{key}.nii.gz" for key in maps},
        **changes,
    }
    (folder / f"{name}_restoration.json").write_text(json.dumps(facts))
    return folder


def _text(page):
    """What a reader sees, the frame left out."""
    page = re.sub(r"(?s)<(style|script).*?</\1>|srcdoc=\"[^\"]*\"", " ", page)
    page = re.sub(r"(?s)<svg.*?</svg>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a scan with a truth, beside the cohort's curve."""
    folder = tmp_path_factory.mktemp("one")
    blobs = (((-20, -10, 30), 14), ((30, -40, 10), 6))
    _results(folder, blobs=blobs, truth=((-20, -10, 34), 14), warnings=["<b>odd</b> & old"])
    metrics = {
        "cohort": {"subjects": 4},
        "scores": {
            "residual": {
                "roc": {"fpr": [1, 0.2, 0], "tpr": [1, 0.6, 0]},
                "pooled_auc": 0.71,
                "pooled_auc_low": 0.6,
                "pooled_auc_high": 0.8,
            }
        },
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    argv = ["--results", folder, "--evaluation", folder / "evaluation"]
    assert report.main(list(map(str, argv))) == 0
    return folder / "report.html"


def test_a_page_needs_no_network_and_no_other_file(page):
    outer = _Addresses(page.read_text())
    (frame,) = outer.frames
    assert "brainsprite" in frame
    inner = _Addresses(frame)
    assert outer.found + inner.found + inner.links + outer.links == []
    assert "@import" not in page.read_text()
    assert page.stat().st_size < 15e6


def test_the_numbers_on_a_page_are_those_of_the_maps(page):
    result = Result.read(page.parent / "P_1_restoration.json")
    text = _text(page.read_text())
    detected, truth = result.mask, result.truth
    assert len(result.lesions) == 2
    dice = 2 * (detected & truth).sum() / (detected.sum() + truth.sum())
    assert 0.5 < dice < 1
    assert f"Dice {dice:.3f}" in text
    tpr = (detected & truth).sum() / truth.sum()
    fpr = (detected & ~truth).sum() / (result.brain & ~truth).sum()
    assert f"{dice:.3f} {tpr:.3f} {fpr:.3f} 1 of 1 1" in text
    large = result.lesions[0]
    center = ", ".join(f"{round(mm)}" for mm in large.center_mm)
    assert large.volume_ml == pytest.approx(4 / 3 * np.pi * 1.4**3, rel=0.15)
    assert f"1 {large.volume_ml:.2f} {center} 0.300 yes" in text
    scores, lesion = result.residual[result.brain], truth[result.brain]
    above = (scores[lesion][:, None] > np.unique(scores)).mean(axis=0)
    false = (scores[~lesion][:, None] > np.unique(scores)).mean(axis=0)
    area = np.trapezoid(np.r_[1, above][::-1], np.r_[1, false][::-1])
    assert f"AUC {area:.3f}" in text
    assert "brain examined 98.7 %" in text
    assert "4.99 %" in text
    assert "4 subjects, pooled AUC 0.710 (0.600 to 0.800)" in text
    assert "For research only" in text
    assert "1.8 per unit intensity" in text


def test_names_and_warnings_are_text_not_markup(page):
    content = page.read_text()
    assert "&lt;b&gt;odd&lt;/b&gt; &amp; old" in content
    assert "<b>odd" not in content


def test_a_scan_without_thresholds_and_truth_still_has_a_page(tmp_path):
    _results(tmp_path, lesions={}, files={n: f"P_1_{n}.nii.gz" for n in ("restored", "residual")})
    assert report.main(["--results", str(tmp_path)]) == 0
    content = (tmp_path / "report.html").read_text()
    text = _text(content)
    assert "none given" in text
    assert "Dice" not in text.replace("(Dice)", "")
    assert "nan" not in text
    assert content.count("<iframe") == 1


def test_a_method_without_lambda_and_steps_has_a_page(tmp_path):
    _results(tmp_path)
    path = tmp_path / "P_1_restoration.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("tv_weight", "steps")}))
    assert report.main(["--results", str(tmp_path)]) == 0
    text = _text((tmp_path / "report.html").read_text())
    assert "per unit intensity" not in text
    assert "restoration every axial slice (30 restored)" in text


def test_lesion_outside_the_restored_brain_changes_no_number_of_a_page(tmp_path, page):
    result = Result.read(page.parent / "P_1_restoration.json")
    truth = result.truth.astype(np.uint8)
    truth[tuple(np.argwhere(~result.brain)[:100].T)] = 1
    seg = tiny_scans.write(tmp_path / "seg.nii.gz", truth, result.scan.affine)
    first, second = (
        measure([each.labeled(every=False)]).scans.iloc[0]
        for each in (result, Result.read(result.facts_path, truth=seg))
    )
    assert second.pop("outside_brain_ml") == pytest.approx(100 * AFFINE_ML)
    assert first.pop("outside_brain_ml") == 0
    assert first.to_dict() == second.to_dict()


def test_an_empty_truth_gives_dashes_instead_of_rates(tmp_path):
    _results(tmp_path, truth=((0, 0, 500), 1))
    assert report.main(["--results", str(tmp_path)]) == 0
    text = _text((tmp_path / "report.html").read_text())
    assert "AUC –" in text
    assert "nan" not in text


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort: a good, a bad and a middling patient, and one that failed."""
    folder = tmp_path_factory.mktemp("cohort")
    ball = ((-20, -10, 30), 14)
    for name, z in (("good", 30), ("bad", 50), ("middling", 38)):
        (folder / name).mkdir()
        _results(folder / name, name, blobs=(ball,), truth=((-20, -10, z), 14))
    scan = {"name": "lost", "status": "failed", "reason": "is truncated", "facts": "lost"}
    (folder / "summary.json").write_text(json.dumps({"scans": [scan]}))
    assert report.main(["--results", str(folder)]) == 0
    return folder


def test_a_cohort_has_a_table_with_the_worst_first_and_a_page_each(cohort):
    content = (cohort / "index.html").read_text()
    rows = _Addresses(content)
    assert rows.links == ["bad.html", "middling.html", "good.html"]
    assert rows.found == []
    dice = [float(v) for v in re.findall(r'data-value="([\d.]+)">0\.\d{3}<', content)][::2]
    assert dice == sorted(dice)
    assert "lost: is truncated" in _text(content)
    for link in rows.links:
        linked = _Addresses((cohort / link).read_text())
        assert linked.links == ["index.html"]


def test_without_a_truth_the_largest_lesions_come_first():
    numbers = {"count": 1, "largest_ml": 1.0, "dice": np.nan, "auc": np.nan, "examined": 1.0}
    rows = [
        {"name": name, "page": f"{name}.html", "volume_ml": ml, "warnings": 0, **numbers}
        for name, ml in (("small", 1.0), ("none", np.nan), ("large", 9.0))
    ]
    content = pages.index_page(rows)
    assert _Addresses(content).links == ["large.html", "small.html", "none.html"]
    assert "Dice" not in content
    assert '<th aria-sort="descending"><button type="button">lesions ml' in content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--results {folder} --force --truth x.nii", "are for one scan"),
        ("--results {folder} --force --evaluation nowhere", "make it with tf-lesion evaluate"),
        ("--results {folder}", "pass --force"),
        ("--results {folder} --out {folder}/summary.json", "pass --force"),
        ("--results nowhere", "No folder of results"),
        ("--results {folder}/../empty", "Expected maps of restore_brats.py"),
    ],
)
def test_what_cannot_be_used_is_one_line(cohort, capsys, options, message):
    (cohort.parent / "empty").mkdir(exist_ok=True)
    assert report.main(options.format(folder=cohort).split()) == 2
    assert message in capsys.readouterr().err


def test_a_scan_that_has_moved_is_asked_for(tmp_path, capsys):
    _results(tmp_path)
    moved = tmp_path / "elsewhere.nii.gz"
    (tmp_path / "P_1_t2.nii.gz").rename(moved)
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "say where that scan is" in capsys.readouterr().err
    assert report.main(["--results", str(tmp_path), "--scan", str(moved)]) == 0


def test_json_of_something_else_is_named(tmp_path, capsys):
    (tmp_path / "x_restoration.json").write_text("{}")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "x_restoration.json as restore_brats.py writes it" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("name", ["page", "cohort"])
def test_chromium_opens_it_without_an_error_or_a_request(request, tmp_path, name):
    path = request.getfixturevalue(name)
    path = path if path.suffix == ".html" else path / "index.html"
    quiet = (
        "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-sync"
    )
    options = [f"--{option}" for option in quiet.split()]
    options += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000"]
    options += [f"--log-net-log={tmp_path / 'net.json'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert "For research only" in done.stdout
    # The browser's own requests (updates, time) have no page that they come from.
    requests = re.findall(r'"initiator":"([^"]*)"', (tmp_path / "net.json").read_text())
    assert set(requests) <= {"not an origin"}


def test_links_of_odd_names_lead_to_their_pages(tmp_path):
    for name in ("50% #1", "a?b"):
        (tmp_path / name).mkdir()
        _results(tmp_path / name, name)
    assert report.main(["--results", str(tmp_path)]) == 0
    links = [urlsplit(link) for link in _Addresses((tmp_path / "index.html").read_text()).links]
    assert len(links) == 2
    for link in links:
        assert (link.query, link.fragment) == ("", "")
        assert (tmp_path / unquote(link.path)).exists(), link


def test_the_page_shows_the_map_that_the_masks_were_made_from(tmp_path):
    """A threshold of a score says nothing about the residual, whose unit is another."""
    folder = _results(tmp_path)
    facts = json.loads((folder / "P_1_restoration.json").read_text())
    volume = nib.load(folder / "P_1_residual.nii.gz")
    score = np.asarray(volume.dataobj, np.float32) * 10
    tiny_scans.write(folder / "P_1_score.nii.gz", score, volume.affine)
    facts["files"]["score"] = "P_1_score.nii.gz"
    for point in facts["lesions"].values():
        point |= {"threshold": 10 * point["threshold"], "of": "score", "unit": "multiples"}
    (folder / "P_1_restoration.json").write_text(json.dumps(facts))
    result = Result.read(folder / "P_1_restoration.json")
    lowest, highest = pictures.shown_range(result)
    assert lowest == 10 * LIMIT < highest
    assert ((result.thresholded > lowest) == result.mask).all()
    assert result.mask.any()
    text = _text(pages.page(result)[0])
    assert f"Color: score above {lowest:.3f} (multiples)" in text
    assert "Scan and score" in text
