"""What the two cohort commands share: options, many subjects at once, parts, one cache.

Each subject is prepared by itself and saved as a part in `OUT.parts/`, under a name that holds a
hash of the settings and of its files' sizes and times. A run that was killed finds the parts it
made and goes on. At the end the parts are put together in order and deleted.
"""

import argparse
import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from tf_lesion import __version__
from tf_lesion.files import InputError, refuse_existing, require_space, written_whole
from tf_lesion.scans.alignment import ALIGN_MODES
from tf_lesion.scans.brain_mask import MASK_MODES
from tf_lesion.scans.discovery import Subject
from tf_lesion.scans.intensity import brain_quantiles, match_to_reference
from tf_lesion.scans.prepare import ScanSettings, prepare_scan

OK, SOME_FAILED = 0, 1  # exit status
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
HASH_LENGTH = 12
DEFAULT_VOXEL_SIZE = 1.0  # mm, that of the paper


@dataclass(frozen=True)
class CohortSettings:
    """How every subject is prepared, and which of its slices are kept."""

    scan: ScanSettings
    slice_step: int = 1  # keep every n-th axial slice
    min_brain: float = 0.0  # keep slices with more than this fraction of the crop in the brain

    def __post_init__(self):
        if self.slice_step < 1:
            raise InputError(f"Expected --slice-step of at least 1, got {self.slice_step}.")
        if not 0 <= self.min_brain < 1:
            raise InputError(f"Expected --min-brain from 0 up to 1, got {self.min_brain}.")


@dataclass(frozen=True)
class Outcome:
    """What became of a subject: a part, or the reason why there is none."""

    subject: Subject
    part: Path | None = None
    reason: str = ""
    warnings: tuple = ()
    disk_full: bool = False


def add_arguments(parser):
    """The options that both commands have."""
    parser.set_defaults(mask_pattern=None, limit=None)  # before: keeps "default: None" off the help
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder of the scans")
    add("--out", type=Path, required=True, help="the cache to write, .h5")
    add(
        "--mask-pattern",
        default=argparse.SUPPRESS,
        help="glob of each scan's brain mask, relative to --input; {subject} stands for the "
        "subject's name, {folder} for the folder of the scan; default: see --mask",
    )
    add(
        "--mask",
        choices=MASK_MODES,
        default="auto",
        help="without mask files: non-zero voxels, or the atlas for scans with a skull",
    )
    add("--align", choices=ALIGN_MODES, default="rigid", help="none: scans are in MNI mm already")
    add("--n4", action="store_true", help="correct the bias field")
    add("--slice-step", type=int, default=1, help="keep every n-th axial slice")
    add(
        "--min-brain",
        type=float,
        default=0.0,
        help="keep slices with more than this fraction of the crop in the brain",
    )
    add("--limit", type=int, default=argparse.SUPPRESS, help="only the first N subjects")
    add("--jobs", type=int, default=1, help="subjects at the same time, one core and 1 GB each")
    add("--force", action="store_true", help="overwrite the output")


def settings_from(args, voxel_size):
    """The `CohortSettings` of parsed arguments."""
    if args.jobs < 1:
        raise InputError(f"Expected --jobs of at least 1, got {args.jobs}.")
    scan = ScanSettings(voxel_size=voxel_size, align=args.align, mask=args.mask, n4=args.n4)
    return CohortSettings(scan=scan, slice_step=args.slice_step, min_brain=args.min_brain)


def limited(subjects, limit):
    """The first `limit` subjects, or all."""
    if limit is not None and limit < 1:
        raise InputError(f"Expected --limit of at least 1, got {limit}.")
    return subjects[:limit]


def prepare_all(subjects, settings, *, out, jobs, reference=None, force=False):
    """Prepare every subject, in `jobs` processes; parts that exist are used again.

    Args:
        subjects: list of `Subject`.
        settings: `CohortSettings`.
        out: the cache to come; parts go to `OUT.parts/`.
        jobs: processes; 1 works in this one.
        reference: [Q] quantiles to match histograms to, or None.
        force: whether an existing `out` may be replaced.

    Returns:
        One `Outcome` per subject, in order.

    Raises:
        FileExistsError: if `out` exists and `force` is false.
        InputError: if every subject fails, or a process is killed.
        OSError: if the disk is full.
    """
    refuse_existing(out, force=force)
    folder = parts_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        (subject, folder / _part_name(subject, settings, reference), settings, reference)
        for subject in subjects
    ]
    outcomes = {}
    with tqdm(total=len(tasks), unit="subject", desc="preparing") as bar:
        for outcome in _run(tasks, jobs):
            _stop_if_full(outcome)
            _tell(bar, outcome)
            outcomes[outcome.subject.name] = outcome
    outcomes = [outcomes[subject.name] for subject in subjects]
    if not any(outcome.part for outcome in outcomes):
        _remove_if_empty(folder)
        raise InputError(
            f"All {len(subjects)} subjects failed, so {out} was not written. The first: "
            f"{outcomes[0].subject.name}: {outcomes[0].reason}"
        )
    return outcomes


def parts_folder(out):
    """Where the parts of a cache wait until all are there."""
    return Path(out).with_name(Path(out).name + ".parts")


def _run(tasks, jobs):
    if jobs == 1:
        yield from (_prepare_one(*task) for task in tasks)
        return
    # Spawned, not forked: ITK's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context)
    try:
        futures = [pool.submit(_prepare_one, *task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise InputError(
            "A process was killed, most likely for want of memory; lower --jobs and run again: "
            "the finished subjects are kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_one(subject, part, settings, reference):
    """Make one part. Any failure is an `Outcome` too: one bad subject must not stop a cohort."""
    try:
        if subject.problem:
            raise InputError(subject.problem)
        if not part.exists():
            _write_part(part, subject, settings, reference)
        with h5py.File(part, "r") as file:
            return Outcome(subject, part=part, warnings=tuple(json.loads(file.attrs["warnings"])))
    except Exception as error:
        reason = str(error) or type(error).__name__
        if not isinstance(error, InputError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        return Outcome(subject, reason=reason, disk_full=_is_full_disk(error))


def _is_full_disk(error):
    # HDF5 reports a failed write as another error, with the text of the errno.
    full = getattr(error, "errno", None) in FULL_DISK
    return full or any(os.strerror(code) in str(error) for code in FULL_DISK)


def _write_part(part, subject, settings, reference):
    prepared = prepare_scan(
        subject.scan,
        settings=settings.scan,
        mask_path=subject.mask,
        label_path=subject.label,
        reference=reference,
    )
    rows = kept_slices(prepared.mask, prepared.grid, settings)
    if len(rows) == 0:
        raise InputError(f"{subject.scan}: no slice holds enough brain; lower --min-brain.")
    arrays = {
        "image": prepared.image,
        "mask": prepared.mask.astype(np.uint8),
        **({} if prepared.label is None else {"label": prepared.label}),
    }
    require_space(part.parent, sum(volume[:, :, rows].nbytes for volume in arrays.values()))
    with written_whole(part) as temporary, h5py.File(temporary, "w") as file:
        for name, volume in arrays.items():
            slices = np.ascontiguousarray(np.moveaxis(volume[:, :, rows], 2, 0))
            chunks = (1, *slices.shape[1:])
            file.create_dataset(name, data=slices, chunks=chunks, compression=1, shuffle=True)
        file["slice_index"] = rows
        file["scan_from_grid"] = prepared.scan_from_grid
        file["quantiles"] = brain_quantiles(prepared.image, prepared.mask)
        file.attrs["warnings"] = json.dumps(prepared.warnings)


def kept_slices(mask, grid, settings):
    """[n] axial indices of the slices with brain in the crop, every `slice_step`-th.

    Args:
        mask: [X, Y, Z] bool on the grid.
        grid: the `MniGrid`.
        settings: `CohortSettings`.
    """
    share = mask[grid.crop_window].mean(axis=(0, 1))
    rows = np.arange(0, mask.shape[2], settings.slice_step)
    return rows[share[rows] > settings.min_brain]


def _part_name(subject, settings, reference):
    files = [path for path in (subject.scan, subject.mask, subject.label) if path is not None]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    told = [__version__, subject.name, stats, dataclasses.asdict(settings)]
    digest = hashlib.sha256(json.dumps(told).encode())
    if reference is not None:
        digest.update(np.asarray(reference, dtype=np.float32).tobytes())
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in subject.name)
    return f"{safe}-{digest.hexdigest()[:HASH_LENGTH]}.h5"


def _stop_if_full(outcome):
    if outcome.disk_full:
        raise OSError(
            errno.ENOSPC,
            f"the disk is full ({outcome.reason}); free some space and run again: "
            "the finished subjects are kept",
        )


def _tell(bar, outcome):
    if outcome.reason:
        bar.write(f"{outcome.subject.name}: skipped: {outcome.reason}", file=sys.stderr)
    for warning in outcome.warnings:
        bar.write(f"{outcome.subject.name}: warning: {warning}", file=sys.stderr)
    bar.update()


def append_part(writer, dataset, outcome, *, with_mask, with_label=False, reference=None):
    """Move one part into a cache, matched to `reference` if given; returns its slice count."""
    with h5py.File(outcome.part, "r") as part:
        image = part["image"][:]
        if reference is not None:
            image = match_to_reference(image, part["mask"][:] > 0, reference)
        writer.append(
            dataset,
            image,
            subject_id=outcome.subject.name,
            slice_index=part["slice_index"][:],
            scan_from_grid=part["scan_from_grid"][:],
            source=str(outcome.subject.scan),
            mask=part["mask"][:] if with_mask else None,
            label=part["label"][:] if with_label else None,
        )
        return len(part["slice_index"])


def quantiles_of(outcome):
    """[Q] quantiles of the brain of a prepared subject."""
    with h5py.File(outcome.part, "r") as part:
        return part["quantiles"][:]


def finish(out, outcomes):
    """Delete the parts, name the subjects that failed; returns the exit status."""
    folder = parts_folder(out)
    for part in [*folder.glob("*.h5"), *folder.glob(".partial-*")]:
        part.unlink()
    _remove_if_empty(folder)
    failed = [outcome for outcome in outcomes if not outcome.part]
    if not failed:
        return OK
    print(f"{len(failed)} of {len(outcomes)} subjects were skipped:", file=sys.stderr)
    for outcome in failed:
        print(f"  {outcome.subject.name}: {outcome.reason}", file=sys.stderr)
    return SOME_FAILED


def _remove_if_empty(folder):
    if not any(folder.iterdir()):
        folder.rmdir()
