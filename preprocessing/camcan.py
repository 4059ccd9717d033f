"""Healthy T2 scans (Cam-CAN, or any BIDS folder) -> the healthy cache, `Train` and `Test`."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from preprocessing import cohort
from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, readable
from tf_lesion.scans import discovery

PATTERN = "sub-*/**/*_T2w.nii*"
TEST_SHARE = 0.08  # 52 of 652, as in the paper
REFERENCE_SUBJECT = "sub-CC110033"  # the one to which the paper's group matches histograms
EXAMPLE = """example:
  python -m preprocessing.camcan --input camcan --out healthy.h5 --test-subjects 52 --jobs 4

Takes about 10 s per subject at 1 mm on one core."""


def find_subjects(
    folder: str | Path, *, pattern: str = PATTERN, mask_pattern: str | None = None
) -> list[discovery.Subject]:
    """The healthy subjects of a folder, sorted by name; see `discovery.find_subjects`."""
    subjects = discovery.find_subjects(folder, [pattern], mask_pattern=mask_pattern)
    return sorted(subjects, key=lambda subject: subject.name)


def split(names: Collection[str], *, seed: int, test_subjects: int | None = None) -> set[str]:
    """The names of the test subjects: drawn by `seed` from the sorted names.

    Which subjects fail does not move the others. Without `test_subjects`, 8 % of the subjects,
    rounded, and at least one: 52 of 652, as in the paper.

    Raises:
        InputError: if fewer than one subject would be left for either side.
    """
    if seed < 0:
        raise InputError(f"Expected --seed of at least 0, got {seed}.")
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


def read_test_list(path: str | Path, names: Sequence[str]) -> set[str]:
    """The names of the test subjects, one a line, from a file.

    Raises:
        FileNotFoundError, InputError: if there is no such file, or it names a subject that is not
            there, or leaves none on either side.
    """
    listed = set(readable(Path(path).read_bytes()).split())
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
    named = {outcome.subject.name: outcome for outcome in outcomes}
    if wanted is not None and not named[wanted].part:
        raise InputError(f"The --reference {wanted} could not be prepared: {named[wanted].reason}")
    train = [outcome for name, outcome in named.items() if name not in test_names]
    test = [outcome for name, outcome in named.items() if name in test_names]
    for dataset, its_own in (("Train", train), ("Test", test)):
        if not any(outcome.part for outcome in its_own):
            raise InputError(
                f"Every subject of {dataset} failed, so no cache was written; the first: "
                f"{its_own[0].subject.name}: {its_own[0].reason}. Repair it and run again."
            )
    candidates = [named.get(wanted), named.get(REFERENCE_SUBJECT), *train]
    return next(outcome for outcome in candidates if outcome and outcome.part)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all subjects went in, 1 if some were skipped, 2 for bad input."""
    parser = parser_for(
        "python -m preprocessing.camcan",
        "Prepare healthy T2 scans: align, mask, normalize, split by subject.",
        epilog=EXAMPLE,
    )
    cohort.add_arguments(parser)
    add(parser, "--pattern", default=PATTERN, help="glob of the scans, relative to --input")
    add(parser.add_mutually_exclusive_group(), "--test-subjects", "--test-list")
    add(parser, "--seed", help="of the split")
    add(parser, "--voxel-size", default=cohort.DEFAULT_VOXEL_SIZE, help="mm of the MNI grid")
    add(
        parser,
        "--reference",
        type=str,
        help="subject to which patients are histogram-matched; default: "
        f"{REFERENCE_SUBJECT} if it is there, else the first to train on",
    )
    add(parser, "--match")
    args = parser.parse_args(argv)
    needs = {"--seed": ("a split that is drawn", args.test_list is None)}
    check_effect(parser, args, needs | cohort.effects(args))
    settings = cohort.settings_from(args, args.voxel_size)
    subjects = find_subjects(args.input, pattern=args.pattern, mask_pattern=args.mask_pattern)
    subjects = subjects[: args.limit]
    names = [subject.name for subject in subjects]
    if args.reference is not None and args.reference not in names:
        raise InputError(
            f"No subject {args.reference!r} for --reference; the subjects are {names[0]} to "
            f"{names[-1]}."
        )
    if args.test_list is not None:
        test_names = read_test_list(args.test_list, names)
    else:
        test_names = split(names, seed=args.seed, test_subjects=args.test_subjects)
    print(f"{len(subjects)} subjects, {len(test_names)} of them to test on.")
    with cohort.alone(args.out, force=args.force):
        outcomes = cohort.prepare_all(
            subjects, args.out, settings=settings, jobs=args.jobs, force=args.force
        )
        chosen = _reference_outcome(outcomes, test_names, args.reference)
        return cohort.write_cache(
            outcomes,
            args.out,
            settings=settings,
            stored={
                "command": "preprocessing.camcan",
                "seed": args.seed,
                "test_subjects": sorted(test_names),
                "reference": chosen.subject.name,
                "matched": args.match,
            },
            reference=cohort.quantiles_of(chosen),
            test_names=test_names,
            match=[outcome for outcome in outcomes if args.match and outcome is not chosen],
            force=args.force,
        )


if __name__ == "__main__":
    raise SystemExit(main())
