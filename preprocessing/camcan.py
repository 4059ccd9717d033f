"""Healthy T2 scans (Cam-CAN, or any BIDS folder) -> the healthy cache, `Train` and `Test`."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from preprocessing import cohort
from tf_lesion.caches.slices import CacheWriter
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError
from tf_lesion.scans import discovery

PATTERN = "sub-*/anat/*_T2w.nii*"
TEST_SHARE = 0.08  # 52 of 652, as in the paper
REFERENCE_SUBJECT = "sub-CC110033"  # the one to which the paper's group matches histograms
EXAMPLE = """example:
  python -m preprocessing.camcan --input camcan --out healthy.h5 --test-subjects 52 --jobs 4

Takes about 10 s per subject at 1 mm on one core."""


def find_subjects(folder, *, pattern=PATTERN, mask_pattern=None):
    """The healthy subjects of a folder, sorted by name.

    Returns:
        list of `Subject`; those without exactly one mask by `mask_pattern` have a `problem`.

    Raises:
        FileNotFoundError, InputError: without a folder, without scans, or with two scans of one
            subject.
    """
    folder = Path(folder)
    scans = discovery.find_scans(folder, [pattern])
    subjects = [
        discovery.subject_with_files(name, scan, folder, mask_pattern=mask_pattern)
        for name, scan in zip(discovery.scan_names(scans, folder), scans, strict=True)
    ]
    discovery.check_unique(subjects)
    return sorted(subjects, key=lambda subject: subject.name)


def split(names, *, seed, test_subjects=None):
    """The names of the test subjects: drawn by `seed` from the sorted names.

    Which subjects fail does not move the others. Without `test_subjects`, 8 % of the subjects,
    rounded, and at least one: 52 of 652, as in the paper.

    Returns:
        set of names.

    Raises:
        InputError: if fewer than one subject would be left for either side.
    """
    names = sorted(names)
    if test_subjects is None:
        test_subjects = max(1, round(TEST_SHARE * len(names)))
    if not 1 <= test_subjects < len(names):
        raise InputError(
            f"Expected at least one subject to train on and one to test on, got {len(names)} "
            f"subjects with --test-subjects {test_subjects}."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[index] for index in order[:test_subjects]}


def read_test_list(path, names):
    """The names of the test subjects, one a line, from a file.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it names a subject that is not there, or leaves none on either side.
    """
    listed = set(Path(path).read_text().split())
    unknown = sorted(listed - set(names))
    if unknown:
        raise InputError(
            f"{path}: expected names of subjects, one a line, such as {names[0]}; there is no "
            f"{unknown[0]!r}."
        )
    if not 1 <= len(listed) < len(names):
        raise InputError(
            f"{path}: expected at least one subject to test on and one not listed to train on, "
            f"got {len(listed)} of {len(names)}."
        )
    return listed


def _reference_outcome(outcomes, test_names, wanted):
    """The outcome whose brain gives `Reference`: as asked, CC110033, or the first of Train."""
    prepared = {outcome.subject.name: outcome for outcome in outcomes if outcome.part}
    if wanted is not None:
        return prepared[wanted]
    if REFERENCE_SUBJECT in prepared:
        return prepared[REFERENCE_SUBJECT]
    return next(outcome for name, outcome in prepared.items() if name not in test_names)


def _check_reference_name(wanted, subjects):
    names = [subject.name for subject in subjects]
    if wanted is not None and wanted not in names:
        raise InputError(
            f"No subject {wanted!r} for --reference; the subjects are {names[0]} to {names[-1]}."
        )


def _check_outcomes(outcomes, test_names, wanted):
    """Raise `InputError` if what is left cannot make a cache."""
    for outcome in outcomes:
        if outcome.subject.name == wanted and not outcome.part:
            raise InputError(f"The --reference {wanted} could not be prepared: {outcome.reason}")
    for dataset in ("Train", "Test"):
        its_own = [o for o in outcomes if (o.subject.name in test_names) == (dataset == "Test")]
        if not any(outcome.part for outcome in its_own):
            raise InputError(
                f"Every subject of {dataset} failed, so no cache was written; the first: "
                f"{its_own[0].subject.name}: {its_own[0].reason}. Repair it and run again."
            )


def write_cache(outcomes, *, out, settings, test_names, seed, reference, match, force):
    """Assemble the healthy cache from the parts; returns {dataset: (subjects, slices)}."""
    chosen = _reference_outcome(outcomes, test_names, reference)
    grid = settings.scan.grid
    stored = {
        **dataclasses.asdict(settings),
        "command": "preprocessing.camcan",
        "seed": seed,
        "test_subjects": sorted(test_names),
        "reference": chosen.subject.name,
        "matched": match,
        "skipped": {o.subject.name: o.reason for o in outcomes if not o.part},
    }
    counts = {"Train": [0, 0], "Test": [0, 0]}
    with CacheWriter(
        out,
        slice_shape=grid.slice_shape,
        crop=grid.crop,
        grid_affine=grid.affine,
        settings=stored,
        force=force,
    ) as writer:
        quantiles = cohort.quantiles_of(chosen)
        writer.set_reference(quantiles)
        for outcome in filter(lambda outcome: outcome.part, outcomes):
            dataset = "Test" if outcome.subject.name in test_names else "Train"
            slices = cohort.append_part(
                writer,
                dataset,
                outcome,
                with_mask=dataset == "Test",
                reference=quantiles if match and outcome is not chosen else None,
            )
            counts[dataset][0] += 1
            counts[dataset][1] += slices
    return {dataset: tuple(count) for dataset, count in counts.items()}


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.camcan",
        description="Prepare healthy T2 scans: align, mask, normalise, split by subject.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(test_subjects=None, test_list=None, reference=None)
    cohort.add_arguments(parser)
    add = parser.add_argument
    add("--pattern", default=PATTERN, help="glob of the scans, relative to --input")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--test-subjects",
        type=int,
        default=argparse.SUPPRESS,
        help="subjects held out, exactly; default: 8 %% of all, at least 1 (52 of 652)",
    )
    held_out.add_argument(
        "--test-list",
        type=Path,
        default=argparse.SUPPRESS,
        help="file with the names of the subjects held out, one a line, instead of a number",
    )
    add("--seed", type=int, default=0, help="of the split")
    add("--voxel-size", type=float, default=cohort.DEFAULT_VOXEL_SIZE, help="mm of the MNI grid")
    add(
        "--reference",
        default=argparse.SUPPRESS,
        help="subject to which patients are histogram-matched; default: "
        f"{REFERENCE_SUBJECT} if it is there, else the first to train on",
    )
    add(
        "--match",
        action="store_true",
        help="histogram-match the healthy subjects to the reference too: for scans of several "
        "scanners, whose min-max intensities differ (the paper's come from one)",
    )
    return parser


@command
def main(argv=None):
    """Run the command; 0 if all subjects went in, 1 if some were skipped, 2 for bad input."""
    args = _parser().parse_args(argv)
    settings = cohort.settings_from(args, args.voxel_size)
    if args.seed < 0:
        raise InputError(f"Expected --seed of at least 0, got {args.seed}.")
    subjects = find_subjects(args.input, pattern=args.pattern, mask_pattern=args.mask_pattern)
    subjects = cohort.limited(subjects, args.limit)
    _check_reference_name(args.reference, subjects)
    names = [subject.name for subject in subjects]
    if args.test_list is not None:
        test_names = read_test_list(args.test_list, names)
    else:
        test_names = split(names, seed=args.seed, test_subjects=args.test_subjects)
    print(f"{len(subjects)} subjects, {len(test_names)} of them to test on.")
    outcomes = cohort.prepare_all(
        subjects, settings, out=args.out, jobs=args.jobs, force=args.force
    )
    _check_outcomes(outcomes, test_names, args.reference)
    counts = write_cache(
        outcomes,
        out=args.out,
        settings=settings,
        test_names=test_names,
        seed=args.seed,
        reference=args.reference,
        match=args.match,
        force=args.force,
    )
    status = cohort.finish(args.out, outcomes)
    for dataset, (number, slices) in counts.items():
        print(f"{dataset}: {number} subjects, {slices} slices")
    print(f"wrote {args.out}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
