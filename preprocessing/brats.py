"""Patients' T2 scans with segmentations (BRATS 2017, BraTS 2018-2023, any) -> the patient cache."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from preprocessing import cohort
from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import GRADE_NAMES, add, parser_for
from tf_lesion.files import InputError
from tf_lesion.scans import discovery
from tf_lesion.scans.discovery import ENDINGS, SUFFIXES, Subject

NAMES = [f"**/*{suffix}{ending}" for suffix in SUFFIXES for ending in ENDINGS]
EXAMPLE = """example:
  python -m preprocessing.brats --input BRATS2017 --out lgg.h5 --reference healthy.h5 --grade LGG
  python -m preprocessing.brats --input ms --out ms.h5 --reference healthy.h5 \\
      --pattern 'patient*/T2.nii.gz' --seg-pattern '{folder}/lesions.nii.gz'

Takes about 10 s per subject at 1 mm on one core."""


def find_subjects(
    folder: str | Path,
    *,
    grade: str = "all",
    pattern: str | None = None,
    mask_pattern: str | None = None,
    seg_pattern: str | None = None,
    labels: bool = True,
) -> list[Subject]:
    """The patients of a folder: LGG, then HGG, then those without a grade, each sorted by name.

    Args:
        folder: {HGG,LGG}/CASE/CASE_t2.nii.gz, or any depth of CASE_t2 or CASE-t2w files.
        grade: "LGG", "HGG" or "all".
        pattern: glob of the scans instead of those names.
        mask_pattern, seg_pattern: see `discovery.find_subjects`; segmentations are by default
            named after the scan.
        labels: whether segmentations are wanted.

    Raises:
        FileNotFoundError, InputError: as `discovery.find_subjects`; if none has that grade.
    """
    folder = Path(folder)
    subjects = discovery.find_subjects(
        folder,
        [pattern] if pattern else NAMES,
        suffixes=SUFFIXES,
        keep=lambda scan: grade in ("all", _grade(scan, folder)),
        mask_pattern=mask_pattern,
        seg_pattern=seg_pattern if labels else None,
    )
    if not subjects:
        raise InputError(
            f"No scans found in a folder {grade} of {folder}, but elsewhere; leave out --grade."
        )
    order = [*GRADE_NAMES, None]
    subjects.sort(key=lambda subject: (order.index(_grade(subject.scan, folder)), subject.name))
    return [_with_segmentation(subject) for subject in subjects] if labels else subjects


def _with_segmentation(subject):
    """The subject with the segmentation named after its scan, unless it has one or a problem."""
    if subject.label or subject.problem:
        return subject
    label = discovery.segmentation_beside(subject.scan)
    if label:
        return dataclasses.replace(subject, label=label, problem=discovery.problem_of(label))
    problem = f"no segmentation beside {subject.scan}; give --seg-pattern or --no-labels"
    return dataclasses.replace(subject, problem=problem)


def _grade(scan, folder):
    """The grade in a scan's path: of the nearest folder called LGG or HGG, or None."""
    local = scan.relative_to(folder).parts[:-1]
    names = (*reversed(local), folder.resolve().name)
    return next((name for name in names if name in GRADE_NAMES), None)


def _reference_and_voxel_size(path, asked):
    """(quantiles [Q], voxel size in mm) of a healthy cache."""
    from tf_lesion.caches.slices import SliceCache

    if path is None:
        raise InputError(
            "Expected --reference, the healthy cache to match histograms to; or --no-matching."
        )
    with SliceCache(path, "Test") as healthy:
        quantiles, affine = healthy.reference, healthy.grid_affine
    if quantiles is None:
        raise InputError(
            f"{path}: no Reference to match histograms to; make the cache with "
            "preprocessing.camcan, or pass --no-matching."
        )
    voxel_size = cohort.DEFAULT_VOXEL_SIZE if affine is None else float(affine[0, 0])
    if asked not in (None, voxel_size):
        raise InputError(
            f"Expected --voxel-size {voxel_size:g}, that of {path}, got {asked:g}: a prior works "
            "on one voxel size."
        )
    return quantiles, voxel_size


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all subjects went in, 1 if some were skipped, 2 for bad input."""
    parser = parser_for(
        "python -m preprocessing.brats",
        "Prepare patients' T2 scans: align, mask, normalize, match histograms.",
        epilog=EXAMPLE,
    )
    cohort.add_arguments(parser)
    add(parser, "--reference", help="the healthy cache, for its Reference")
    add(parser, "--no-matching", "--grade")
    add(
        parser,
        "--pattern",
        help=f"glob of the scans, relative to --input; default: {' or '.join(NAMES)}",
    )
    add(
        parser,
        "--seg-pattern",
        help="glob of each scan's segmentation, relative to --input, with {subject} and {folder}; "
        "default: CASE_seg or CASE-seg beside the scan",
    )
    add(parser, "--no-labels")
    add(parser, "--voxel-size", help="mm of the MNI grid; default: that of the reference, else 1")
    args = parser.parse_args(argv)
    needs = {
        "--reference": ("matching", not args.no_matching),
        "--seg-pattern": ("labels", not args.no_labels),
    }
    check_effect(parser, args, needs | cohort.effects(args))
    if args.no_matching:
        reference, voxel_size = None, args.voxel_size or cohort.DEFAULT_VOXEL_SIZE
    else:
        reference, voxel_size = _reference_and_voxel_size(args.reference, args.voxel_size)
    settings = cohort.settings_from(args, voxel_size)
    subjects = find_subjects(
        args.input,
        grade=args.grade,
        pattern=args.pattern,
        mask_pattern=args.mask_pattern,
        seg_pattern=args.seg_pattern,
        labels=not args.no_labels,
    )[: args.limit]
    print(f"{len(subjects)} subjects.")
    shared = {"settings": settings, "reference": reference, "force": args.force}
    with cohort.alone(args.out, force=args.force):
        outcomes = cohort.prepare_all(subjects, args.out, jobs=args.jobs, **shared)
        return cohort.write_cache(
            outcomes,
            args.out,
            stored={
                "command": "preprocessing.brats",
                "grade": args.grade,
                "matched_to": None if reference is None else str(args.reference),
            },
            test_names={subject.name for subject in subjects},
            **shared,
        )


if __name__ == "__main__":
    raise SystemExit(main())
