"""What the two cohort commands share: options, many subjects at once, parts, one cache.

Each subject is prepared by itself and saved as a part in `OUT.parts/`, under a name that holds a
hash of the settings and of its files' content. A run that was killed finds the parts it
made and goes on. At the end the parts are put together in order, and deleted if none is missing.
"""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tf_lesion import __version__
from tf_lesion.caches.hdf5 import intact, new_hdf5, open_hdf5, text
from tf_lesion.cli.options import add
from tf_lesion.files import (
    InputError,
    content_identity,
    locked,
    refuse_existing,
    remove_abandoned,
    require_space,
    written_whole,
)
from tf_lesion.scans import MASK_MODES
from tf_lesion.scans.discovery import Subject

if TYPE_CHECKING:  # these bring SimpleITK and nilearn, which --help can do without
    from tf_lesion.scans.prepare import ScanSettings

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
MOST_NAMED = 10  # subjects whose brain was taken for another kind than most
DEFAULT_VOXEL_SIZE = 1.0  # mm, that of the paper
KILLED = "A process was killed, most likely for want of memory; lower --jobs and run again"


@dataclass(frozen=True)
class CohortSettings:
    """How every subject is prepared, and which of its slices are kept."""

    scan: "ScanSettings"
    slice_step: int = 1  # keep every n-th axial slice
    min_brain: float = 0.0  # keep slices with more than this fraction of the crop in the brain

    def __post_init__(self):
        if not 0 <= self.min_brain < 1:
            raise InputError(f"Expected --min-brain from 0 up to 1, got {self.min_brain}.")


@dataclass(frozen=True)
class Outcome:
    """What became of a subject: a part, or the reason why there is none."""

    subject: Subject
    part: Path | None = None
    reason: str = ""
    brain: str = ""  # what it was taken for: `Brain.kind`
    warnings: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    add(parser, "--input", required=True, help="folder of the scans")
    add(parser, "--out", required=True, help="the cache to write, .h5")
    text = "glob of each scan's brain mask, with {subject} for its name and {folder} for its folder"
    add(parser, "--mask-pattern", help=f"{text}, relative to --input; default: see --mask")
    text = "without mask files: as the brain finder sees it, non-zero voxels, or the atlas"
    add(parser, "--mask", type=str, choices=MASK_MODES, default="auto", help=text)
    add(parser, "--align", default="rigid", help="none: scans are in MNI mm already")
    add(parser, "--allow-poor-alignment")
    add(parser, "--n4", "--slice-step", "--min-brain", "--limit")
    add(parser, "--jobs", help="subjects at the same time, one core and 1 GB each")
    add(parser, "--force")


def effects(args: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """What the shared options need, for `check_effect`."""
    return {"--mask": ("scans without --mask-pattern", args.mask_pattern is None)}


def settings_from(args: argparse.Namespace, voxel_size: float) -> CohortSettings:
    """The `CohortSettings` of parsed arguments."""
    from tf_lesion.scans.prepare import ScanSettings

    scan = ScanSettings(
        voxel_size=voxel_size,
        align=args.align,
        mask=args.mask,
        n4=args.n4,
        allow_poor_alignment=args.allow_poor_alignment,
    )
    return CohortSettings(scan=scan, slice_step=args.slice_step, min_brain=args.min_brain)


def in_processes(
    work: Callable[..., Any], tasks: Sequence[tuple], jobs: int, *, killed: str = KILLED
) -> Iterator[Any]:
    """Results of `work(*task)` in order, by `jobs` new processes; 1 works in this one.

    A process that is killed makes an `InputError`, `killed`.
    """
    import joblib
    from joblib.externals.loky import get_reusable_executor

    jobs = max(1, min(jobs, len(tasks)))
    try:
        yield from joblib.Parallel(jobs, return_as="generator")(
            joblib.delayed(work)(*task) for task in tasks
        )
    except BrokenProcessPool as error:
        raise InputError(f"{killed}.") from error
    finally:
        if jobs > 1:  # kept, they would do the next work in the folder of this one
            get_reusable_executor().shutdown()


@contextlib.contextmanager
def alone(out: str | Path, *, force: bool) -> Iterator[None]:
    """Hold the parts of a cache, so that no other process makes the same one meanwhile.

    Raises:
        FileExistsError: if `out` exists and `force` is false.
        InputError: if another process makes it.
    """
    refuse_existing(out, force=force)
    folder = parts_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        _remove_if_empty(folder)


def prepare_all(
    subjects: Sequence[Subject],
    out: str | Path,
    *,
    settings: CohortSettings,
    jobs: int,
    reference: np.ndarray | None = None,
    force: bool = False,
) -> list[Outcome]:
    """One `Outcome` per subject, in order, by `jobs` processes; parts that exist are used again.

    Parts go to `OUT.parts/`, matched to the quantiles `reference` [Q] if given.

    Raises:
        FileExistsError: if `out` exists and `force` is false.
        InputError: if every subject fails, or a process is killed.
        OSError: if the disk is full.
    """
    refuse_existing(out, force=force)
    folder = parts_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(subject, folder, settings, reference) for subject in subjects]
    kept = "the finished subjects are kept"
    results = in_processes(_prepare_one, tasks, jobs, killed=f"{KILLED}: {kept}")
    outcomes = []
    with tqdm(results, total=len(tasks), unit="subject", desc="preparing") as bar:
        for outcome in bar:
            # HDF5 reports a failed write as another error, with the text of the errno.
            if any(os.strerror(code) in outcome.reason for code in FULL_DISK):
                full = f"the disk is full ({outcome.reason}); free some space and run again: {kept}"
                raise OSError(errno.ENOSPC, full)
            if outcome.reason:
                bar.write(f"{outcome.subject.name}: skipped: {outcome.reason}", file=sys.stderr)
            for warning in outcome.warnings:
                bar.write(f"{outcome.subject.name}: warning: {warning}", file=sys.stderr)
            outcomes.append(outcome)
    if not any(outcome.part for outcome in outcomes):
        _remove_if_empty(folder)
        raise InputError(
            f"All {len(subjects)} subjects failed, so {out} was not written. The first: "
            f"{outcomes[0].subject.name}: {outcomes[0].reason}"
        )
    return outcomes


def parts_folder(out: str | Path) -> Path:
    """Where the parts of a cache wait until all are there."""
    return Path(out).with_name(Path(out).name + ".parts")


def _prepare_one(subject, folder, settings, reference):
    """Make one part. Any failure is an `Outcome` too: one bad subject must not stop a cohort."""
    try:
        if subject.problem:
            raise InputError(subject.problem)
        part = folder / _part_name(subject, settings, reference)
        told = _told_by(part) if part.exists() else None
        if told is None:
            _write_part(part, subject, settings, reference)
            told = _told_by(part)
        return Outcome(subject, part=part, **told)
    except Exception as error:
        reason = str(error) or type(error).__name__
        if not isinstance(error, InputError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        return Outcome(subject, reason=reason)


def _told_by(part):
    """Brain and warnings of a part; None if it is damaged, which makes it again."""
    try:
        with _opened(part) as file, intact(part):
            file["image"][-1], file["mask"][-1], file["quantiles"][:]
            told = json.loads(file.attrs["told"])
            return {"brain": told["brain"], "warnings": tuple(told["warnings"])}
    except InputError:
        return None


def _opened(part):
    return open_hdf5(part, what="prepared subject", made_by="the same command, given again")


def _write_part(part, subject, settings, reference):
    from tf_lesion.scans.intensity import brain_quantiles
    from tf_lesion.scans.prepare import prepare_scan

    prepared = prepare_scan(
        subject.scan,
        settings=settings.scan,
        mask_path=subject.mask,
        label_path=subject.label,
        reference=reference,
    )
    share = prepared.mask[prepared.grid.crop_window].mean(axis=(0, 1))
    rows = np.arange(0, len(share), settings.slice_step)
    rows = rows[share[rows] > settings.min_brain]
    if len(rows) == 0:
        raise InputError(f"{subject.scan}: no slice holds enough brain; lower --min-brain.")
    volumes = {"image": prepared.image, "mask": prepared.mask.astype(np.uint8)}
    if prepared.label is not None:
        volumes["label"] = prepared.label
    slices = {name: np.moveaxis(volume[:, :, rows], 2, 0) for name, volume in volumes.items()}
    require_space(part.parent, sum(values.nbytes for values in slices.values()))
    with written_whole(part) as temporary, new_hdf5(temporary) as file:
        for name, values in slices.items():
            chunks = (1, *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks, compression=1, shuffle=True)
        file["slice_index"] = rows
        file["scan_from_grid"] = prepared.scan_from_grid
        file["quantiles"] = brain_quantiles(prepared.image, prepared.mask)
        warnings = [*prepared.scan.warnings, *prepared.warnings]
        told = {"brain": prepared.brain_kind, "warnings": warnings}
        file.attrs["told"] = text(json.dumps(told))


def _part_name(subject, settings, reference):
    files = (subject.scan, subject.mask, subject.label)
    contents = [path and content_identity(path) for path in files]
    told = [__version__, subject.name, contents, dataclasses.asdict(settings)]
    digest = hashlib.sha256(json.dumps(told).encode())
    if reference is not None:
        digest.update(np.asarray(reference, dtype=np.float32).tobytes())
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in subject.name)
    return f"{safe}-{digest.hexdigest()[:12]}.h5"


def quantiles_of(outcome: Outcome) -> np.ndarray:
    """[Q] quantiles of the brain of a prepared subject."""
    with _opened(outcome.part) as part, intact(outcome.part):
        return part["quantiles"][:]


def write_cache(
    outcomes: Sequence[Outcome],
    out: str | Path,
    *,
    settings: CohortSettings,
    stored: dict[str, Any],
    reference: np.ndarray | None,
    test_names: set[str],
    match: Sequence[Outcome] = (),
    force: bool = False,
) -> int:
    """Put the parts together in one cache, and say what there is and what is missing.

    The parts are deleted, unless a subject is missing: once it is mended, they are used again.

    Args:
        stored: JSON-serializable, kept beside the settings.
        reference: [Q] quantiles kept as `Reference`, or None.
        test_names: subjects of `Test`, with their masks; the others go to `Train`.
        match: those to be matched to `reference` now.

    Returns:
        The exit status: 0, or 1 if some subjects failed.
    """
    from tf_lesion.caches.slices import CacheWriter

    grid = settings.scan.grid
    skipped = {one.subject.name: one.reason for one in outcomes if not one.part}
    brains = {one.subject.name: one.brain for one in outcomes if one.part}
    counts = {"Train": [], "Test": []}
    with CacheWriter(
        out,
        slice_shape=grid.slice_shape,
        crop=grid.crop,
        grid_affine=grid.affine,
        settings={**dataclasses.asdict(settings), **stored, "brains": brains, "skipped": skipped},
        force=force,
    ) as writer:
        if reference is not None:
            writer.set_reference(reference)
        for outcome in outcomes:
            if outcome.part:
                dataset = "Test" if outcome.subject.name in test_names else "Train"
                target = reference if outcome in match else None
                counts[dataset].append(_append_part(writer, dataset, outcome, target))
    folder = parts_folder(out)
    for part in [] if skipped else folder.glob("*.h5"):
        part.unlink()
    remove_abandoned(folder)
    _remove_if_empty(folder)
    for dataset, slices in counts.items():
        if slices:
            print(f"{dataset}: {len(slices)} subjects, {sum(slices)} slices")
    print(f"Brains: {_counted(brains)}")
    print(f"wrote {out}")
    if skipped:
        print(f"{len(skipped)} of {len(outcomes)} subjects were skipped:", file=sys.stderr)
        for name, reason in skipped.items():
            print(f"  {name}: {reason}", file=sys.stderr)
        print(
            f"Mend them and run again with --force: the others are kept in {folder}, which can be "
            f"deleted otherwise.",
            file=sys.stderr,
        )
    return 1 if skipped else 0


def _counted(brains):
    """How many brains of each kind there are, and which, where they are few among others."""
    kinds = Counter(brains.values()).most_common()
    parts = [f"{count} {kind}" for kind, count in kinds]
    for at, (kind, count) in enumerate(kinds[1:], start=1):
        if count <= MOST_NAMED:
            parts[at] += f" ({', '.join(name for name in brains if brains[name] == kind)})"
    return ", ".join(parts)


def _append_part(writer, dataset, outcome, reference):
    """Move one part into a cache, matched to `reference` if given; returns its slice count."""
    from tf_lesion.scans.intensity import match_to_reference

    with _opened(outcome.part) as part, intact(outcome.part):
        image, mask = part["image"][:], part["mask"][:]
        if reference is not None:
            image = match_to_reference(image, mask > 0, reference)
        writer.append(
            dataset,
            image,
            subject_id=outcome.subject.name,
            slice_index=part["slice_index"][:],
            scan_from_grid=part["scan_from_grid"][:],
            source=str(outcome.subject.scan),
            mask=mask if dataset == "Test" else None,
            label=part["label"][:] if "label" in part else None,
        )
    return len(image)


def _remove_if_empty(folder):
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
