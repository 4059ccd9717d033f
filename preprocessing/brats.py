"""Patients' T2 scans with segmentations (BRATS 2017, BraTS 2018-2023, any) -> the patient cache."""

import argparse
import dataclasses
from pathlib import Path

from preprocessing import cohort
from tf_lesion.caches.slices import CacheWriter, SliceCache
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError
from tf_lesion.scans import discovery
from tf_lesion.scans.discovery import ENDINGS, SUFFIXES, segmentation_beside

GRADES = ("LGG", "HGG")  # in the order of the paper's evaluation
EXAMPLE = """example:
  python -m preprocessing.brats --input BRATS2017 --out lgg.h5 --reference healthy.h5 --grade LGG
  python -m preprocessing.brats --input ms --out ms.h5 --reference healthy.h5 \\
      --pattern 'patient*/T2.nii.gz' --seg-pattern '{folder}/lesions.nii.gz'

Takes about 10 s per subject at 1 mm on one core."""


def default_patterns():
    """Globs of the T2 scans of BRATS 2017 and its successors."""
    return [f"**/*{suffix}{ending}" for suffix in SUFFIXES for ending in ENDINGS]


def find_subjects(
    folder, *, grade="all", pattern=None, mask_pattern=None, seg_pattern=None, labels=True
):
    """The patients of a folder: LGG, then HGG, then those without a grade, each sorted by name.

    Args:
        folder: {HGG,LGG}/CASE/CASE_t2.nii.gz, or any depth of CASE_t2 or CASE-t2w files.
        grade: "LGG", "HGG" or "all".
        pattern: glob of the scans instead of those names.
        mask_pattern: glob of the masks, with {subject} and {folder}; exactly one for each scan.
        seg_pattern: glob of the segmentations, likewise; by default they are named after the scan.
        labels: whether segmentations are wanted.

    Returns:
        list of `Subject`; those without a file that is wanted have a `problem`.

    Raises:
        FileNotFoundError, InputError: without a folder, without scans (of that grade), or with two
            scans of a subject.
    """
    folder = Path(folder)
    scans = discovery.find_scans(folder, [pattern] if pattern else default_patterns())
    names = discovery.scan_names(scans, folder, suffixes=SUFFIXES)
    found = [(_grade(scan, folder), name, scan) for scan, name in zip(scans, names, strict=True)]
    if grade != "all":
        found = [row for row in found if row[0] == grade]
        if not found:
            raise InputError(
                f"No scans found in a folder {grade} of {folder}, but {len(scans)} elsewhere; "
                "leave out --grade."
            )
    patterns = {"mask_pattern": mask_pattern, "seg_pattern": seg_pattern if labels else None}
    subjects = [
        discovery.subject_with_files(name, scan, folder, **patterns)
        for _, name, scan in sorted(found, key=_rank)
    ]
    discovery.check_unique(subjects)
    return [_with_segmentation(subject) for subject in subjects] if labels else subjects


def _with_segmentation(subject):
    """The subject with the segmentation named after its scan, unless it has one or a problem."""
    if subject.label or subject.problem:
        return subject
    label = segmentation_beside(subject.scan)
    if label is None:
        problem = f"no segmentation beside {subject.scan}; give --seg-pattern or --no-labels"
        return dataclasses.replace(subject, problem=problem)
    return dataclasses.replace(subject, label=label)


def _grade(scan, folder):
    """The grade in a scan's path: of the nearest folder called LGG or HGG, or None."""
    local = scan.relative_to(folder).parts[:-1]
    names = (*reversed(local), folder.resolve().name)
    return next((name for name in names if name in GRADES), None)


def _rank(row):
    grade, name, _ = row
    return (GRADES.index(grade) if grade else len(GRADES), name)


def read_reference(path):
    """(quantiles [Q], voxel size in mm) of a healthy cache.

    Raises:
        FileNotFoundError, InputError: if it is no cache, or has no `Reference`.
    """
    with SliceCache(path, "Test") as healthy:
        if healthy.reference is None:
            raise InputError(
                f"{path}: no Reference to match histograms to; make the cache with "
                "preprocessing.camcan, or pass --no-matching."
            )
        affine = healthy.grid_affine
        return healthy.reference, cohort.DEFAULT_VOXEL_SIZE if affine is None else affine[0, 0]


def _reference_and_voxel_size(args):
    """What to match to (or None) and the grid: the reference's unless --voxel-size says another."""
    asked, path = args.voxel_size, args.reference
    if args.no_matching:
        return None, asked or cohort.DEFAULT_VOXEL_SIZE
    if path is None:
        raise InputError(
            "Expected --reference, the healthy cache to match histograms to; or --no-matching."
        )
    quantiles, voxel_size = read_reference(path)
    if asked is not None and asked != voxel_size:
        raise InputError(
            f"Expected --voxel-size {voxel_size:g}, that of {path}, got {asked:g}: a prior works "
            "on one voxel size."
        )
    return quantiles, float(voxel_size)


def write_cache(outcomes, *, out, settings, reference, stored, with_label, force):
    """Assemble the patient cache from the parts; returns (subjects, slices)."""
    grid = settings.scan.grid
    prepared = [outcome for outcome in outcomes if outcome.part]
    with CacheWriter(
        out,
        slice_shape=grid.slice_shape,
        crop=grid.crop,
        grid_affine=grid.affine,
        settings={**dataclasses.asdict(settings), **stored},
        force=force,
    ) as writer:
        if reference is not None:
            writer.set_reference(reference)
        slices = sum(
            cohort.append_part(writer, "Test", outcome, with_mask=True, with_label=with_label)
            for outcome in prepared
        )
    return len(prepared), slices


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.brats",
        description="Prepare patients' T2 scans: align, mask, normalise, match histograms.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(reference=None, pattern=None, seg_pattern=None, voxel_size=None)
    cohort.add_arguments(parser)
    add = parser.add_argument
    hidden = argparse.SUPPRESS
    add("--reference", type=Path, default=hidden, help="the healthy cache, for its Reference")
    add("--no-matching", action="store_true", help="do not match histograms")
    add("--grade", choices=(*GRADES, "all"), default="all", help="all: LGG first")
    add(
        "--pattern",
        default=hidden,
        help=f"glob of the scans, relative to --input; default: {' or '.join(default_patterns())}",
    )
    add(
        "--seg-pattern",
        default=hidden,
        help="glob of each scan's segmentation, relative to --input, with {subject} and {folder}; "
        "default: CASE_seg or CASE-seg beside the scan",
    )
    add("--no-labels", action="store_true", help="do without segmentations")
    add(
        "--voxel-size",
        type=float,
        default=hidden,
        help="mm of the MNI grid; default: that of the reference, else 1",
    )
    return parser


@command
def main(argv=None):
    """Run the command; 0 if all subjects went in, 1 if some were skipped, 2 for bad input."""
    args = _parser().parse_args(argv)
    reference, voxel_size = _reference_and_voxel_size(args)
    settings = cohort.settings_from(args, voxel_size)
    subjects = find_subjects(
        args.input,
        grade=args.grade,
        pattern=args.pattern,
        mask_pattern=args.mask_pattern,
        seg_pattern=args.seg_pattern,
        labels=not args.no_labels,
    )
    subjects = cohort.limited(subjects, args.limit)
    print(f"{len(subjects)} subjects.")
    outcomes = cohort.prepare_all(
        subjects,
        settings,
        out=args.out,
        jobs=args.jobs,
        reference=reference,
        force=args.force,
    )
    stored = {
        "command": "preprocessing.brats",
        "grade": args.grade,
        "matched_to": None if reference is None else str(args.reference),
        "skipped": {o.subject.name: o.reason for o in outcomes if not o.part},
    }
    number, slices = write_cache(
        outcomes,
        out=args.out,
        settings=settings,
        reference=reference,
        stored=stored,
        with_label=not args.no_labels,
        force=args.force,
    )
    status = cohort.finish(args.out, outcomes)
    print(f"Test: {number} subjects, {slices} slices\nwrote {args.out}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
