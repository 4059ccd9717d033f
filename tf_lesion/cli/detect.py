"""Detect lesions in T2 scans: restored scan, residual, score and lesion masks in the scan's grid.

    tf-lesion detect patient_t2.nii.gz maps
    tf-lesion detect exam.zip maps --series 5
    tf-lesion detect dataset derivatives participant --participant-label 01 02

Of a folder every scan is taken; one that fails does not stop the rest (exit status 1), one that is
done is skipped. Of DICOM, a folder without NIfTI or a zip, every study is a scan. The last form is
that of BIDS Apps. tf-lesion report makes a page to look at.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from tf_lesion.cli.command import command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.config import DETECTOR
from tf_lesion.files import InputError

PATTERNS = ("pattern", "mask_pattern", "seg_pattern")
SETTINGS = ("tv_weight", "steps", "solver")
CITATION = (
    "To be cited: S. You, K. C. Tezcan, X. Chen, E. Konukoglu. Unsupervised Lesion\n"
    "Detection via Image Restoration with a Normative Prior. MIDL 2019."
)
DEVICE = ("--device", "--threads")


def parser() -> Any:
    """The command line."""
    made = parser_for("tf-lesion detect", __doc__)
    made.add_argument("scan", help="T2 scan (NIfTI, DICOM folder or zip), folder of scans, or BIDS")
    made.add_argument("out", type=Path, help="folder to write to")
    made.add_argument("level", nargs="?", choices=["participant"], help="the form of BIDS Apps")
    add(made, "--model", default=DETECTOR)
    add(made, "--participant-label", "--series", "--calibration", "--mask", *patterns(), "--align")
    add(made, "--allow-poor-alignment")
    add(made, *restoring(), "--slice-step", "--batch-size", "--precision", "--seed", *DEVICE)
    add(made, "--bids-out", "--force")
    add(made, "--postprocess", default="auto")
    add(made.add_mutually_exclusive_group(), "--verbose", "--quiet")
    return made


def patterns() -> tuple[str, ...]:
    """Options that say which files of a folder are scans, masks and segmentations."""
    return ("--pattern", "--mask-pattern", "--seg-pattern")


def restoring() -> tuple[str, ...]:
    """Options that say how slices are restored."""
    return ("--tv-weight", "--steps", "--solver")


def load_prior(options: Any) -> Any:
    """The `Prior` of --model, with the calibration of --calibration in place of its own."""
    from tf_lesion import devices

    devices.start(device=options.device, threads=options.threads, tf32=options.precision == "tf32")
    from tf_lesion.prior import load

    prior = load(options.model, precision=options.precision)
    if options.calibration is None:
        return prior
    from tf_lesion.calibration import Calibration

    calibration = Calibration.load(options.calibration)
    calibration.check_model(prior.identity, where=options.calibration)
    return dataclasses.replace(prior, calibration=calibration)


def restoration_of(prior: Any, options: Any, *, calibrated: bool) -> Any:
    """`RestorationConfig` of the options; without any the calibration's, or the preset's."""
    given = {name: getattr(options, name) for name in SETTINGS}
    if calibrated and not any(value is not None for value in given.values()):
        return prior.calibrated()
    return prior.restoration(**given)


def detector_of(prior: Any, options: Any, *, calibrated: bool) -> Any:
    """The `Detector` of the options; a given calibration that does not fit them is an error."""
    from tf_lesion.detection.maps import Detector
    from tf_lesion.detection.settings import postprocessing_of

    restoration = restoration_of(prior, options, calibrated=calibrated)
    points = None
    if options.calibration is not None:
        steps = postprocessing_of(prior, options.postprocess)
        points = prior.calibration.thresholds(
            "score" if str(steps) else "residual",
            restoration=prior.describe(steps.restoration(restoration)),
            postprocessing=str(steps),
        )
    detector = Detector(
        prior,
        restoration,
        postprocess=options.postprocess,
        points=points,
        align=options.align,
        allow_poor_alignment=options.allow_poor_alignment,
        seed=options.seed,
        batch_size=options.batch_size,
        slice_step=options.slice_step,
    )
    if detector.unfit:
        print(f"No lesion maps: {detector.unfit}", file=sys.stderr)
    return detector


@dataclasses.dataclass(frozen=True)
class Found:
    """The scans of a source; `many` if each gets a folder of its own."""

    source: Path
    subjects: list[Any]
    many: bool


def find(source: Path, options: Any) -> Found:
    """The scans that a scan, a folder, a data set, a folder or zip of DICOM means.

    Raises:
        FileNotFoundError, InputError: if there are none, or for options that it cannot have.
    """
    from tf_lesion.detection import files, layout
    from tf_lesion.scans.dicom.choice import find_exams
    from tf_lesion.scans.dicom.files import is_exam

    labels, out = getattr(options, "participant_label", None) or (), options.out
    exam = is_exam(source, left_out=out)
    check_sources(source, options, exam=exam, labels=labels)
    if exam:
        subjects = find_exams(source, options.series, left_out=out)
        many = len(subjects) > 1
        if options.mask and many:
            raise InputError(f"--mask is for one scan; {source} holds {len(subjects)} studies.")
        subjects = [dataclasses.replace(subject, mask=options.mask) for subject in subjects]
        return Found(source, subjects, many)
    if source.is_dir():
        given = {name: getattr(options, name) for name in PATTERNS}
        return Found(source, files.find_scans(source, out=out, labels=labels, **given), True)
    return Found(source, [layout.one_scan(source, mask=options.mask)], False)


def detect_scans(detector: Any, found: Found, options: Any, *, typed: str) -> int:
    """Detect in the scans that were found; returns the exit status."""
    from tf_lesion.detection import files, layout
    from tf_lesion.detection.progress import LOG, Progress

    source, out, bids = found.source, options.out, options.bids_out
    if bids:
        files.refuse_other_dataset(out, force=options.force)
    with Progress(len(found.subjects), screen=_screen(options), log=out / LOG) as progress:
        _tell_beginning(progress, detector, typed)
        written = {"command": typed, "force": options.force, "progress": progress}
        if found.many:
            rows = files.detect_many(detector, found.subjects, out, bids=bids, **written)
        else:
            (subject,) = found.subjects
            with progress.scan(subject.name):
                place = layout.layout_of(subject, out, bids=bids)
                files.detect_one(detector, subject, place, **written)
                progress.tell(layout.DONE)
            rows = [{"status": layout.DONE}]
        if bids:
            files.write_dataset_description(out, source if source.is_dir() else source.parent)
        statuses = [row["status"] for row in rows]
        counts = [f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses)]
        progress.say(f"Wrote maps of {source} to {out}: {', '.join(counts)}.")
        if layout.FAILED in statuses:
            progress.say(f"What went wrong is in {out / LOG} too.")
        if progress.first and layout.DONE in statuses and not options.quiet:
            print(CITATION)
    return int(layout.FAILED in statuses)


def _screen(options):
    from tf_lesion.detection.progress import NORMAL, QUIET, VERBOSE

    return VERBOSE if options.verbose else QUIET if options.quiet else NORMAL


def _tell_beginning(progress, detector, typed):
    """To the log what runs, and to the screen of who wants to know."""
    from tf_lesion.provenance import stamp

    made_by = stamp()
    device, versions = made_by["device"], made_by["versions"]
    commit = f" ({made_by['commit'][:12]})" if made_by["commit"] else ""
    lines = [
        typed,
        f"tf_lesion {made_by['tf_lesion_version']}{commit} on {device['name']}, "
        f"{device['threads']} threads; {', '.join(map(' '.join, versions.items()))}",
        f"model {detector.prior.path}, {len(detector.points)} thresholds, "
        f"postprocessing {detector.postprocessing or 'none'}",
    ]
    for line in [*lines, detector.unfit and f"no lesion maps: {detector.unfit}"]:
        if line:
            progress.detail(line)


def check_sources(source: Path, options: Any, *, exam: bool, labels: Any) -> None:
    """Raise `InputError` for options of a folder with one scan, and the other way round."""
    folder = source.is_dir() and not exam
    if folder and options.mask:
        raise InputError("--mask is for one scan; for a folder give --mask-pattern.")
    if any(getattr(options, name) for name in PATTERNS) and not folder:
        raise InputError(
            "--pattern, --mask-pattern and --seg-pattern need a folder of NIfTI scans."
        )
    if labels and not folder:
        raise InputError(f"--participant-label needs a BIDS dataset, got {source}.")
    if options.series is not None and not exam:
        raise InputError(f"--series needs DICOM without NIfTI beside it, got {source}.")


def typed_line(name: str, argv: list[str] | None) -> str:
    """The command as it was typed."""
    return f"{name} {shlex.join(sys.argv[1:] if argv is None else argv)}"


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    options.bids_out = options.bids_out or options.level is not None
    found = find(Path(options.scan), options)
    prior = load_prior(options)
    typed = typed_line("tf-lesion detect", argv)
    detector = detector_of(prior, options, calibrated=True)
    return detect_scans(detector, found, options, typed=typed)
