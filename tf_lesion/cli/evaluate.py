"""How well lesions are found: restored slices of a cache, or maps of scans, against their labels.

Scores, all of them over the voxels of the restored brain: residual, abs(observed - restored);
score, the same post-processed; intensity and equalized, the scan's own intensity, plain and
histogram-equalized, which need no model. Writes scans.csv (every number of every scan and score),
scores.csv and metrics.json (over all scans, with intervals and ROC curves), sizes.csv (lesions
found by their size), table.md and pictures.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, file_name, refuse_existing, write_json, write_text
from tf_lesion.provenance import stamp

if TYPE_CHECKING:
    from tf_lesion.detection.postprocessing import Postprocessing
    from tf_lesion.evaluation.measure import Measured
    from tf_lesion.evaluation.results import Missing

METRICS = "metrics.json"
FILES = (METRICS, "scans.csv", "scores.csv", "sizes.csv", "table.md")
PANEL_SLICES = 7  # columns of the paper's Figure 1
PANEL_POINTS = ("dsc5", "dsc_auc")  # the first of these that is there makes the panel's detection
SCAN_SLICES = 5  # columns of the picture of a scan
MOST_SCANS = 50  # rows for each of so many scans in table.md
UNKNOWN = "unknown"  # the model of a released file
LOST_SHARE = 0.02  # of the lesion, outside the restored brain; above it a warning says so

OF_CACHE = (
    *("--cache", "--labels", "--subjects", "--crop", "--calibration"),
    *("--postprocess", "--compare", "--all-combinations"),
)

EXAMPLE = """examples:
  tf-lesion evaluate --results maps --out evaluation
  tf-lesion evaluate --restored restored.h5 --cache patients.h5 --out evaluation \\
      --calibration runs/gmvae/calibration.h5"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = parser_for("tf-lesion evaluate", __doc__, epilog=EXAMPLE)
    source = arguments.add_mutually_exclusive_group(required=True)
    add(source, "--restored", "--results", nargs="+")
    add(arguments, "--cache", "--labels", "--subjects", nargs="+")
    add(arguments, "--crop", "--calibration", "--protocol", "--pdf", "--force")
    add(arguments, "--seed", help="of the bootstrap intervals")
    add(arguments, "--groups", "--connectivity", "--smallest-lesion", "--overlap")
    add(arguments, "--out", required=True, help="folder of tables and pictures")
    steps = arguments.add_mutually_exclusive_group()
    add(steps, "--postprocess", help="also measure the residual after these steps")
    add(steps, "--compare")
    add(arguments, "--all-combinations")
    add(arguments.add_mutually_exclusive_group(), "--seg", "--seg-pattern")
    return arguments


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the tables."""
    options = parser().parse_args(argv)
    needs = dict.fromkeys(OF_CACHE, ("--restored", bool(options.restored)))
    needs |= dict.fromkeys(("--seg", "--seg-pattern"), ("--results", bool(options.results)))
    needs["--all-combinations"] = ("--compare", bool(options.compare))
    check_effect(parser(), options, needs)
    for path in (*(options.out / name for name in FILES), *_pictures("panel", options)):
        refuse_existing(path, force=options.force)
    return _of_maps(options) if options.results else _of_cache(options)


def _of_cache(options):
    from tf_lesion.calibration import Calibration
    from tf_lesion.evaluation import plots
    from tf_lesion.evaluation.scans import from_cache, largest_lesions

    calibration = Calibration.load(options.calibration) if options.calibration else None
    cohorts = _cohorts(options, calibration)
    points = _points(calibration, cohorts, where=options.calibration)
    measured = _measure(from_cache(cohorts, points=points), options)
    settings = {
        "restored": list(map(str, options.restored)),
        "cache": list(map(str, options.cache)),
        "restoration": [cohort.settings for cohort in cohorts],
        "calibration": options.calibration and str(options.calibration),
        "thresholds": {score: [asdict(p) for p in found] for score, found in points.items()},
    }
    with _written(measured, options, settings) as text:
        residual = measured.scores.set_index("score").loc["residual"]
        plots.cases(
            options.out / "panel.png",
            largest_lesions(cohorts, PANEL_SLICES),
            {name: residual.get(f"threshold_{name}") for name in PANEL_POINTS},
            pdf=options.pdf,
            force=options.force,
        )
    print(text, end="")
    return 0


def _of_maps(options):
    from tf_lesion.evaluation.results import find_labeled, from_maps

    given = {"seg": options.seg, "seg_pattern": options.seg_pattern, "progress": _bar}
    results, missing = find_labeled(options.results, **given)
    for lost in missing:
        print(f"warning: {lost.name} is left out: {lost.reason}", file=sys.stderr)
    pictures = {name: _pictures(f"{name}_panel", options) for name in results}
    for path in itertools.chain(*pictures.values()):
        refuse_existing(path, force=options.force)
    measured = _measure(from_maps(results), options)
    settings = {"results": [str(path) for path in options.results]}
    with _written(measured, options, settings, missing) as text:
        for name, rows in measured.scans.groupby("scan", sort=False):
            _draw_scan(pictures[name][0], replace(results[name]), name, rows, options)
    print(text, end="")
    return int(any(lost.damaged for lost in missing))


def _pictures(name, options):
    """The files of a picture: PNG, and PDF beside it if that is wanted."""
    picture = options.out / file_name(f"{name}.png")
    return [picture, *([picture.with_suffix(".pdf")] if options.pdf else [])]


def _bar(scans, text):
    from tqdm import tqdm

    return tqdm(scans, text, unit="scan")


def _measure(scans, options):
    from tf_lesion.evaluation.measure import measure, read_groups

    groups = read_groups(options.groups) if options.groups else None
    given = {"protocol": options.protocol, "seed": options.seed, "groups": groups}
    return measure(scans, **given, counting=_counting(options), progress=_bar)


def _counting(options):
    """The `Counting` that was asked for.

    Raises:
        InputError: if a number makes no sense.
    """
    from tf_lesion.detection.lesions import Counting

    if options.smallest_lesion < 0:
        raise InputError(f"Expected --smallest-lesion of 0 or more, got {options.smallest_lesion}.")
    if not 0 <= options.overlap < 1:
        raise InputError(f"Expected --overlap of 0 to less than 1, got {options.overlap}.")
    return Counting(options.connectivity, options.smallest_lesion, options.overlap)


def _draw_scan(path, result, name, rows, options):
    """The picture of a scan, and a warning if much of its lesions was not looked at."""
    from tf_lesion.report.pictures import scan_picture

    areas = [f"{s} {area:.3f}" for s, area in zip(rows["score"], rows["auc"], strict=True)]
    title = f"{name}: AUC of {', '.join(areas)}"
    scan_picture(path, result, title, count=SCAN_SLICES, pdf=options.pdf, force=options.force)
    lost, inside = rows[["outside_brain_ml", "lesion_ml"]].iloc[0]
    if lost > LOST_SHARE * (lost + inside):
        where = f"{lost:.2f} ml of its lesions are outside the restored brain and not counted"
        print(f"warning: {name}: {where}.", file=sys.stderr)


@contextlib.contextmanager
def _written(
    measured: "Measured",
    options: argparse.Namespace,
    settings: dict[str, Any],
    missing: "Sequence[Missing]" = (),
) -> Iterator[str]:
    """Write the tables before the body writes the pictures; yields the text of table.md.

    `metrics.json`, which vouches for all of them, goes before the first and comes after the last;
    both it and table.md say which scans are missing.
    """
    from tf_lesion.evaluation import tables

    (options.out / METRICS).unlink(missing_ok=True)
    for name in ("scans", "scores", "sizes"):
        write_text(options.out / f"{name}.csv", getattr(measured, name).to_csv(index=False))
    each_scan = measured.cohort["subjects"] <= MOST_SCANS
    text = tables.report(measured, each_scan=each_scan, missing=missing)
    write_text(options.out / "table.md", text)
    yield text
    settings = {"protocol": options.protocol, "seed": options.seed, **settings}
    settings |= {"groups": options.groups and str(options.groups)}
    settings |= {"lesions": asdict(_counting(options))}
    told = [{"scan": lost.name, "reason": lost.reason} for lost in missing]
    content = {**stamp(), "settings": settings, "missing": told, **measured.as_json()}
    write_json(options.out / METRICS, content)


# Restored slices --------------------------------------------------------------------------------


def _cohorts(options, calibration):
    """[`Cohort`] with the scores that were asked for."""
    from tf_lesion.caches.slices import read_counts
    from tf_lesion.detection.postprocessing import Postprocessing
    from tf_lesion.evaluation.scans import Cohort

    number = len(options.restored)
    if options.cache is None:
        raise InputError("Expected the cache of the restored slices; give it with --cache.")
    files = {name: getattr(options, name) for name in ("cache", "labels", "subjects")}
    for name, paths in files.items():
        if paths is not None and len(paths) != number:
            raise InputError(f"Expected {number} files with --{name}, one per --restored.")
    variants = {}
    if options.compare:
        every = options.all_combinations
        variants = variants_of(Postprocessing.parse(options.compare), every=every)
    elif options.postprocess:
        variants = {"score": Postprocessing.parse(options.postprocess)}
    given = {"variants": variants, "healthy": calibration and calibration.healthy}
    files = [paths or [None] * number for paths in files.values()]
    return [
        Cohort(restored, cache, labels, counts and read_counts(counts), options.crop, **given)
        for restored, cache, labels, counts in zip(options.restored, *files, strict=True)
    ]


def variants_of(steps: "Postprocessing", *, every: bool = False) -> "dict[str, Postprocessing]":
    """{name: `Postprocessing`}: none of the steps, each alone, all; or every combination.

    What averages restorations is left out: it was done while restoring.
    """
    from tf_lesion.evaluation.scans import AVERAGES

    none = type(steps)()
    names = [f.name for f in fields(steps) if f.name not in AVERAGES]
    names = [name for name in names if getattr(steps, name) != getattr(none, name)]
    counts = range(len(names) + 1) if every else dict.fromkeys((0, 1, len(names)))
    chosen = [part for count in counts for part in combinations(names, count)]
    made = [replace(none, **{name: getattr(steps, name) for name in part}) for part in chosen]
    return {str(variant) or "plain": variant for variant in made}


def _points(calibration, cohorts, *, where):
    """{score: thresholds} of a calibration that must be of the cohorts' model and restoration."""
    points = {}
    for cohort in cohorts if calibration else ():
        used = cohort.settings
        calibration.check_model(used.get("model_identity", UNKNOWN), where=where)
        for score in cohort.scores:
            if score in calibration.points:
                points[score] = calibration.thresholds(
                    score, restoration=used, postprocessing=used.get("postprocessing", "")
                )
    return points


if __name__ == "__main__":
    raise SystemExit(main())
