"""How well lesions are found: restored slices of a cache, or maps of scans, against their labels.

Scores, all of them over the voxels of the restored brain: residual, abs(observed - restored);
score, the same post-processed; intensity and equalized, the scan's own intensity, plain and
histogram-equalized, which need no model. Writes scans.csv (every number of every scan and score),
scores.csv and metrics.json (over all scans, with intervals and ROC curves), table.md and pictures.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from tf_lesion.cli.command import command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, refuse_existing, write_json, written_whole
from tf_lesion.provenance import stamp

if TYPE_CHECKING:
    from tf_lesion.detection.postprocessing import Postprocessing
    from tf_lesion.evaluation.measure import Measured

FILES = ("metrics.json", "scans.csv", "scores.csv", "table.md")
PANEL_SLICES = 7  # columns of the paper's Figure 1
PANEL_POINTS = ("dsc5", "dsc_auc")  # the first of these that is there makes the panel's detection
SCAN_SLICES = 5  # columns of the picture of a scan
MOST_SCANS = 50  # rows for each of so many scans in table.md
UNKNOWN = "unknown"  # the model of a released file
LOST_SHARE = 0.02  # of the lesion, outside the restored brain; above it a warning says so

EXAMPLE = """examples:
  tf-lesion evaluate --results maps --out evaluation
  tf-lesion evaluate --restored restored.h5 --cache patients.h5 --out evaluation \\
      --calibration runs/gmvae/calibration.h5

Takes about 5 s per scan at 1 mm."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = parser_for("tf-lesion evaluate", __doc__, epilog=EXAMPLE)
    source = arguments.add_mutually_exclusive_group(required=True)
    add(source, "--restored", "--results", nargs="+")
    add(arguments, "--cache", "--labels", "--subjects", nargs="+")
    add(arguments, "--crop", "--calibration", "--protocol", "--pdf", "--force")
    add(arguments, "--seed", help="of the bootstrap intervals")
    add(arguments, "--out", required=True, help="folder of tables and pictures")
    steps = arguments.add_mutually_exclusive_group()
    add(steps, "--postprocess", nargs="+", help="also measure the residual after these steps")
    add(steps, "--compare")
    add(arguments, "--all-combinations")
    add(arguments.add_mutually_exclusive_group(), "--seg", "--seg-pattern")
    return arguments


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the tables."""
    options = parser().parse_args(argv)
    for name in (*FILES, "panel.png"):
        refuse_existing(options.out / name, force=options.force)
    return _of_maps(options) if options.results else _of_cache(options)


def _of_cache(options):
    from tf_lesion.evaluation import plots
    from tf_lesion.evaluation.scans import from_cache, largest_lesions

    cohorts, variants = _cohorts(options)
    points, calibration = _points(options.calibration, cohorts, several=bool(variants))
    measured = _measure(from_cache(cohorts, points=points, variants=variants), options)
    settings = {
        "restored": [str(cohort.restored) for cohort in cohorts],
        "cache": [str(cohort.cache) for cohort in cohorts],
        "restoration": [cohort.settings for cohort in cohorts],
        "calibration": calibration,
    }
    text = _write(measured, options, settings)
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
    from tf_lesion.report.pictures import scan_picture

    results = find_labeled(options.results, seg=options.seg, seg_pattern=options.seg_pattern)
    pictures = {name: options.out / f"{name}_panel.png" for name in results}
    for path in pictures.values():
        refuse_existing(path, force=options.force)
    measured = _measure(from_maps(results), options)
    text = _write(measured, options, {"results": [str(path) for path in options.results]})
    for name, rows in measured.scans.groupby("scan", sort=False):
        areas = ", ".join(
            f"{s} {area:.3f}" for s, area in zip(rows["score"], rows["auc"], strict=True)
        )
        title = f"{name}: AUC of {areas}"
        result = replace(results[name])
        scan_picture(
            pictures[name], result, title, count=SCAN_SLICES, pdf=options.pdf, force=options.force
        )
        lost, inside = rows[["outside_brain_ml", "lesion_ml"]].iloc[0]
        if lost > LOST_SHARE * (lost + inside):
            where = f"{lost:.2f} ml of its lesions are outside the restored brain and not counted"
            print(f"warning: {name}: {where}.", file=sys.stderr)
    print(text, end="")
    return 0


def _measure(scans, options):
    from tqdm import tqdm

    from tf_lesion.evaluation.measure import measure

    def bar(scans, text):
        return tqdm(scans, text, unit="scan")

    return measure(scans, protocol=options.protocol, seed=options.seed, progress=bar)


def _write(measured: "Measured", options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """Write the tables; returns the text of table.md."""
    from tf_lesion.evaluation import tables

    settings = {"protocol": options.protocol, "seed": options.seed, **settings}
    content = {**stamp(), "settings": settings, **measured.as_json()}
    write_json(options.out / "metrics.json", content)
    for name in ("scans", "scores"):
        with written_whole(options.out / f"{name}.csv") as path:
            getattr(measured, name).to_csv(path, index=False)
    text = tables.report(measured, each_scan=measured.cohort["subjects"] <= MOST_SCANS)
    with written_whole(options.out / "table.md") as path:
        path.write_text(text)
    return text


# Restored slices --------------------------------------------------------------------------------


def _cohorts(options):
    """([`Cohort`], {name: `Postprocessing`} of several scores, or {})."""
    from tf_lesion.caches.slices import read_counts
    from tf_lesion.calibration import Calibration
    from tf_lesion.evaluation.scans import Cohort

    number = len(options.restored)
    files = {name: getattr(options, name) for name in ("cache", "labels", "subjects")}
    if files["cache"] is None:
        raise InputError("Expected the cache of the restored slices; give it with --cache.")
    for name, paths in files.items():
        if paths is not None and len(paths) != number:
            raise InputError(f"Expected {number} files with --{name}, one per --restored.")
    steps, variants = _steps(options)
    cohorts = [
        Cohort(restored, cache, labels, counts and read_counts(counts), options.crop)
        for restored, cache, labels, counts in zip(
            options.restored, *(files[name] or [None] * number for name in files), strict=True
        )
    ]
    if steps is None:
        return cohorts, variants
    healthy = Calibration.load(options.calibration).healthy if options.calibration else None
    cohorts = [replace(cohort, postprocessing=steps, healthy=healthy) for cohort in cohorts]
    return [_with_own_averages(c) if variants else c for c in cohorts], variants


def _steps(options):
    """(`Postprocessing` that needs all that is measured, or None; {name: each} if several)."""
    from tf_lesion.detection.postprocessing import Postprocessing

    if options.compare:
        steps = Postprocessing.parse(options.compare)
        return steps, variants_of(steps, every=options.all_combinations)
    given = [Postprocessing.parse(text) for text in options.postprocess or ()]
    if len(given) < 2:
        return (given or [None])[0], {}
    needy = max(given, key=lambda steps: (steps.needs_healthy, steps.needs_axes))
    return needy, {str(steps): steps for steps in given}


def variants_of(steps: "Postprocessing", *, every: bool = False) -> "dict[str, Postprocessing]":
    """{name: `Postprocessing`}: none of the steps, each alone, all; or every combination.

    What averages restorations is left out: files differ in it.
    """
    from tf_lesion.evaluation.scans import AVERAGES

    none = type(steps)()
    names = [f.name for f in fields(steps) if f.name not in AVERAGES]
    names = [name for name in names if getattr(steps, name) != getattr(none, name)]
    counts = range(len(names) + 1) if every else dict.fromkeys((0, 1, len(names)))
    chosen = [part for count in counts for part in combinations(names, count)]
    made = [replace(none, **{name: getattr(steps, name) for name in part}) for part in chosen]
    return {str(variant) or "plain": variant for variant in made}


def _with_own_averages(cohort):
    """The cohort, its post-processing with the averages that its slices were restored with."""
    from tf_lesion.evaluation.scans import AVERAGES

    used = cohort.settings
    own = {name: used[name] for name in AVERAGES if name in used}
    return replace(cohort, postprocessing=replace(cohort.postprocessing, **own))


def _points(path, cohorts, *, several):
    """({score: thresholds}, what metrics.json says of them) of a calibration, if one is given.

    Of several post-processed scores none has thresholds.
    """
    if path is None:
        return {}, None
    from tf_lesion.calibration import Calibration

    calibration, points = Calibration.load(path), {}
    for cohort in cohorts:
        used = cohort.settings
        calibration.check_model(used.get("model_identity", UNKNOWN), where=path)
        for score in cohort.scores:
            if score in calibration.points and not (several and score == "score"):
                points[score] = calibration.thresholds(
                    score, restoration=used, postprocessing=used.get("postprocessing", "")
                )
    described = {score: [asdict(point) for point in found] for score, found in points.items()}
    identity = calibration.model_identity
    return points, {"path": str(path), "model_identity": identity, "points": described}


if __name__ == "__main__":
    raise SystemExit(main())
