"""The report: one file that needs no other, whose numbers are those of the maps."""

import gzip
import html
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nibabel as nib
import numpy as np
import pytest
import tiny_scans
from tiny_maps import AFFINE_ML, LIMIT, maps_of

from tf_lesion.cli import report
from tf_lesion.cli.command import EXIT_INTERRUPTED
from tf_lesion.evaluation.measure import measure
from tf_lesion.evaluation.results import CENTER, Result
from tf_lesion.files import InputError
from tf_lesion.report import pages, viewer

FETCHING = {"src", "href", "data", "action", "poster", "srcset"}


class _Addresses(HTMLParser):
    """Everything a page would fetch, and the links that one could follow."""

    def __init__(self, text):
        super().__init__()
        self.found, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(value)
            elif name in FETCHING and not value.startswith("data:"):
                self.found.append(value)


def _text(page):
    """What a reader sees, lesions of the other thresholds included."""
    page = re.sub(r"(?s)<(style|script).*?</\1>", " ", page)
    page = re.sub(r"(?s)<svg.*?</svg>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def _viewer_data(page):
    (found,) = re.findall(
        r'(?s)<script type="application/json" id="viewer-data">(.*?)</script>', page
    )
    return json.loads(found)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a scan with a truth, beside the cohort's curve."""
    folder = tmp_path_factory.mktemp("one")
    blobs = (((-20, -10, 30), 14), ((30, -40, 10), 6))
    maps_of(folder, blobs=blobs, truth=((-20, -10, 34), 14), warnings=["<b>odd</b> & old"])
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
    content = page.read_text()
    addresses = _Addresses(content)
    assert addresses.found + addresses.links == []
    assert "@import" not in re.sub(r"(?s)<script.*?</script>", "", content)
    for name in ("niivue.min.js", "viewer.js", "NIIVUE_LICENSE.txt"):
        assert (Path(pages.__file__).parent / name).read_text() in content
    assert page.stat().st_size < 15e6


def test_the_numbers_on_a_page_are_those_of_the_maps(page):
    result = Result.read(page.parent / "P_1_restoration.json")
    text = _text(page.read_text())
    detected, truth = result.mask, result.truth
    rows = result.lesions_at(result.point)
    assert len(rows) == 2
    dice = 2 * (detected & truth).sum() / (detected.sum() + truth.sum())
    assert 0.5 < dice < 1
    assert f"Dice {dice:.3f}" in text
    tpr = (detected & truth).sum() / truth.sum()
    fpr = (detected & ~truth).sum() / (result.brain & ~truth).sum()
    assert f"{dice:.3f} {tpr:.3f} {fpr:.3f} 1 of 1 1" in text
    large = rows[0]
    center = ", ".join(f"{round(large[name])}" for name in CENTER)
    assert large["volume_ml"] == pytest.approx(4 / 3 * np.pi * 1.4**3, rel=0.15)
    assert f"1 {large['volume_ml']:.2f} {center} 0.300 yes" in text
    marked = 0.0499 * result.brain.sum() * AFFINE_ML * 0.987
    assert f"5 % 0.15 4.99 % {marked:.1f} 2 " in text
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


def test_a_scan_without_thresholds_and_truth_still_has_a_page(tmp_path, capsys):
    maps_of(tmp_path, lesions={}, files={n: f"P_1_{n}.nii.gz" for n in ("restored", "residual")})
    assert report.main(["--results", str(tmp_path), "--target-fpr", "0.05"]) == 2
    assert "Expected --target-fpr only with maps with thresholds" in capsys.readouterr().err
    assert report.main(["--results", str(tmp_path)]) == 0
    content = (tmp_path / "report.html").read_text()
    text = _text(content)
    assert "none given" in text
    assert "Dice" not in text.replace("(Dice)", "")
    assert "nan" not in text
    layers = _viewer_data(content)["layers"]
    assert [layer["name"] for layer in layers] == ["scan", "restored", "residual", "brain"]


def test_a_method_without_lambda_and_steps_has_a_page(tmp_path):
    maps_of(tmp_path)
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
    maps_of(tmp_path, truth=((0, 0, 500), 1))
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
        maps_of(folder / name, name, blobs=(ball,), truth=((-20, -10, z), 14))
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


def test_damaged_scans_of_a_cohort_are_named_and_the_others_have_their_pages(tmp_path, capsys):
    changes = {"whole": {}, "few": {"brain_ml": None}, "cut": {}}
    for name, changed in changes.items():
        (tmp_path / name).mkdir()
        maps_of(tmp_path / name, name, **changed)
    cut = tmp_path / "cut" / "cut_residual.nii.gz"
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "cohort").mkdir()
    for name in (*changes, "gone"):
        (tmp_path / "cohort" / name).symlink_to(tmp_path / name)
    assert report.main(["--results", str(tmp_path / "cohort")]) == 1
    said = capsys.readouterr().err
    text = _text((tmp_path / "cohort" / "index.html").read_text())
    reasons = ("few_restoration.json: Expected", "cut_residual.nii.gz: expected", "its content is")
    for reason in reasons:
        assert reason in said
        assert reason in text
    assert {path.name for path in (tmp_path / "cohort").glob("*.html")} == {
        "index.html",
        "whole.html",
    }
    assert report.main(["--results", str(tmp_path / "cut")]) == 2
    assert "make this map again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "roc", ['{"fpr": [1, 0]}', '{"fpr": "x", "tpr": []}', '{"fpr": [1, 0], "tpr": [1]}']
)
def test_an_evaluation_of_another_form_is_named(tmp_path, roc):
    known = '"pooled_auc": null, "pooled_auc_low": null, "pooled_auc_high": null'
    scores = f'{{"residual": {{{known}, "roc": {roc}}}}}'
    (tmp_path / "metrics.json").write_text(f'{{"cohort": {{"subjects": 3}}, "scores": {scores}}}')
    with pytest.raises(InputError, match=r"metrics\.json"):
        pages.read_evaluation(tmp_path)


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
    maps_of(tmp_path)
    moved = tmp_path / "elsewhere.nii.gz"
    (tmp_path / "P_1_t2.nii.gz").rename(moved)
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "say where that scan is" in capsys.readouterr().err
    assert report.main(["--results", str(tmp_path), "--scan", str(moved)]) == 0


def test_json_of_something_else_is_named(tmp_path, capsys):
    (tmp_path / "x_restoration.json").write_text("{}")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "x_restoration.json as restore_brats.py writes it" in capsys.readouterr().err


def test_links_of_odd_names_lead_to_their_pages(tmp_path):
    for name in ("50% #1", "a?b"):
        (tmp_path / name).mkdir()
        maps_of(tmp_path / name, name)
    assert report.main(["--results", str(tmp_path)]) == 0
    links = [urlsplit(link) for link in _Addresses((tmp_path / "index.html").read_text()).links]
    assert len(links) == 2
    for link in links:
        assert (link.query, link.fragment) == ("", "")
        assert (tmp_path / unquote(link.path)).exists(), link


def test_a_scan_called_as_the_table_has_a_page_of_its_own(tmp_path):
    for name in ("index", "b"):
        maps_of(tmp_path / name, name)
    assert report.main(["--results", str(tmp_path)]) == 0
    links = _Addresses((tmp_path / "index.html").read_text()).links
    assert sorted(links) == ["b.html", "index_scan.html"]
    assert all((tmp_path / link).exists() for link in links)


def test_a_table_does_not_outlive_its_pages(tmp_path, monkeypatch):
    for name in ("a", "b"):
        maps_of(tmp_path / name, name)
    assert report.main(["--results", str(tmp_path)]) == 0
    real = pages.page

    def killed(result, **options):
        if result.facts["name"] == "b":
            raise KeyboardInterrupt
        return real(result, **options)

    monkeypatch.setattr(pages, "page", killed)
    assert report.main(["--results", str(tmp_path), "--force"]) == EXIT_INTERRUPTED
    assert not (tmp_path / "index.html").exists()


def test_a_page_says_what_the_brain_was_taken_for(tmp_path):
    maps_of(tmp_path, brain={"kind": "stripped"})
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "taken as stripped of its skull" in (tmp_path / "report.html").read_text()


def test_the_page_shows_the_map_that_the_masks_were_made_from(tmp_path):
    """A threshold of a score says nothing about the residual, whose unit is another."""
    folder = maps_of(tmp_path)
    facts = json.loads((folder / "P_1_restoration.json").read_text())
    volume = nib.load(folder / "P_1_residual.nii.gz")
    score = np.asarray(volume.dataobj, np.float32) * 10
    tiny_scans.write(folder / "P_1_score.nii.gz", score, volume.affine)
    facts["files"]["score"] = "P_1_score.nii.gz"
    for point in facts["lesions"].values():
        point |= {"threshold": 10 * point["threshold"], "of": "score", "unit": "multiples"}
    (folder / "P_1_restoration.json").write_text(json.dumps(facts))
    result = Result.read(folder / "P_1_restoration.json")
    content = pages.page(result)[0]
    layers = {layer["name"]: layer for layer in _viewer_data(content)["layers"]}
    assert layers["score"]["from"] == 10 * LIMIT < layers["score"]["to"]
    assert layers["score"]["unit"] == "multiples"
    assert layers["residual"]["unit"] == "normalized intensity"
    image = nib.Nifti1Image.from_bytes(gzip.decompress(b64decode(layers["score"]["nifti"])))
    grid = viewer.grid_of(result, most_voxels=1e9)
    assert ((image.get_fdata() > 10 * LIMIT) == result.mask[grid.window]).all()
    assert result.mask.any()
    text = _text(content)
    assert "score above" in text
