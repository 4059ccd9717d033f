"""Synthetic cohorts: healthy T2-like brains, and patients with lesions, in the layouts users have.

Files:
    OUT/healthy/sub-CC110033/anat/sub-CC110033_T2w.nii.gz   as in Cam-CAN (BIDS)
    OUT/patients/HGG/Brats17_PHA_0_1/Brats17_PHA_0_1_t2.nii.gz, ..._seg.nii.gz   as in BRATS 2017
        ..._twin.nii.gz   the same scan without its lesions, but with what they push
    OUT/patients/stroke/Stroke_PHA_0_1/..., OUT/patients/ms/MS_PHA_0_1/...   with --lesions
    OUT/heads/head-0000_T2w.nii.gz, ..._mask.nii.gz, ..._seg.nii.gz, head-0000.json   scans with
        skull, of any contrast, pose and acquisition, and the truth about them (--heads)
    OUT/test_subjects.txt   the healthy of the anatomies held out, for camcan --test-list
    OUT/phantom.json   settings, seed, version, and what was drawn for each subject

Patients have gliomas, or with --lesions stroke an infarct, or with --lesions ms the lesions of
multiple sclerosis. Those two have label 2 in the segmentation: whatever is not 0 is lesion.

With --label-maps the subjects take the anatomies in turn. With --held-out N, patients and the
--test healthy subjects have the last N anatomies (by name) and the other healthy ones the rest.

Subject i of a kind depends only on the seed, the kind, i, the voxel size and the anatomies: not on
how many others are made, nor by how many processes. The files are the same byte for byte.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preprocessing.cohort import in_processes
from preprocessing.phantom import GLIOMA, GRADES, HEALTHY, HELD_OUT, MS, PATIENT, STROKE
from preprocessing.phantom.nifti import write_nifti
from tf_lesion import __version__
from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, refuse_existing, written_whole

SMALLEST_VOXEL_MM, LARGEST_VOXEL_MM = 0.5, 4.0
# Cam-CAN numbers; sub-CC110033 is the usual reference of histogram matching.
FIRST_NUMBER = {HEALTHY: 110033, HELD_OUT: 710033}
KIND_NAMES = {HEALTHY: "healthy", HELD_OUT: "healthy, held out", PATIENT: "patient"}
MOST_SUBJECTS = 9000  # of a kind, so that Cam-CAN numbers go on beginning with 11
CASE_NAMES = {GLIOMA: "Brats17", STROKE: "Stroke", MS: "MS"}
HEADS = "heads"  # folder of the painted heads
MANIFEST = "phantom.json"
GROUPS = "groups.csv"
EXAMPLE = """example:
  python -m preprocessing.phantom --out cohort --healthy 20 --patients 8 --seed 1 --voxel-size 2

Takes about 4 s per subject at 1 mm and 2 s at 2 mm on one core; a file at 1 mm has about 2 MB."""


def write_cohort(
    out: str | Path,
    *,
    healthy: int,
    patients: int,
    seed: int,
    test: int = 0,
    heads: int = 0,
    held_out: int = 0,
    voxel_size: float = 1.0,
    label_maps: str | Path | None = None,
    lesions: str = GLIOMA,
    jobs: int = 1,
    force: bool = False,
) -> dict[str, Any]:
    """Write a cohort, whole or not at all; returns the content of phantom.json.

    Args:
        test: number of further healthy subjects, of the anatomies held out.
        heads: number of painted heads, of those anatomies as well.
        held_out: number of label maps kept for them and the patients; 0 shares all.
        voxel_size: mm, 0.5 to 4.
        label_maps: folder of FreeSurfer label maps; None for the ICBM152 anatomy.
        lesions: what patients have, GLIOMA, STROKE or MS.
        force: replace an existing folder.

    Raises:
        FileExistsError: if `out` exists and `force` is false.
        InputError: for numbers out of range, or label maps that are missing or of another kind.
    """
    from preprocessing.phantom.sources import find_label_maps
    from preprocessing.phantom.subject import default_settings

    counts = {HEALTHY: healthy, HELD_OUT: test, PATIENT: patients}
    _check_numbers({**counts, HEADS: heads}, seed=seed, voxel_size=voxel_size)
    refuse_existing(out, force=force, marker=MANIFEST)
    maps = find_label_maps(label_maps) if label_maps else []
    anatomies = _split_anatomies(maps, held_out, test, heads)
    with written_whole(out, force=force, marker=MANIFEST) as folder:
        tasks = [
            (folder, kind, number, anatomies[kind], seed, voxel_size, lesions)
            for kind, count in counts.items()
            for number in range(count)
        ]
        made = in_processes(_write_subject, tasks, jobs)
        head_tasks = [
            (folder / HEADS, tuple(anatomies[PATIENT]), seed, number, voxel_size)
            for number in range(heads)
        ]
        painted = in_processes(_write_head, head_tasks, jobs)
        manifest = {
            "tf_lesion_version": __version__,
            "seed": seed,
            "voxel_size": voxel_size,
            "healthy": healthy,
            "test": test,
            "patients": patients,
            "label_maps": [path.name for path in maps],
            "held_out": [path.name for path in anatomies[PATIENT]] if held_out else [],
            "settings": asdict(default_settings(maps)),
            "subjects": list(tqdm(made, total=len(tasks), desc="phantom", unit="scan")),
            "heads": list(tqdm(painted, total=heads, desc="heads", unit="scan", disable=not heads)),
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        (folder / GROUPS).write_text(_groups(manifest["subjects"]), encoding="utf-8")
        if test:
            names = [f"{_camcan_name(HELD_OUT, number)}\n" for number in range(test)]
            (folder / "test_subjects.txt").write_text("".join(names), encoding="utf-8")
    return json.loads(text)


def subject_files(kind: int, number: int, lesions: str = GLIOMA) -> tuple[Path, ...]:
    """Paths of a scan, and of a patient's segmentation and twin, relative to the cohort."""
    if kind != PATIENT:
        name = _camcan_name(kind, number)
        return (Path("healthy", name, "anat", f"{name}_T2w.nii.gz"),)
    name = f"{CASE_NAMES[lesions]}_PHA_{number}_1"
    group = GRADES[number % len(GRADES)] if lesions == GLIOMA else lesions
    folder = Path("patients", group, name)
    return tuple(folder / f"{name}_{part}.nii.gz" for part in ("t2", "seg", "twin"))


def _camcan_name(kind, number):
    return f"sub-CC{FIRST_NUMBER[kind] + number}"


def _split_anatomies(maps, held_out, test, heads):
    """The label maps of each kind of subject: {kind: paths}."""
    if not 0 <= held_out < max(len(maps), 1):
        raise InputError(
            f"Expected --held-out of 0 or more and less than the label maps, got {held_out} of "
            f"{len(maps)}."
        )
    if heads and not maps:
        raise InputError("Heads need label maps of whole heads: give --label-maps.")
    if test and not held_out:
        raise InputError(
            "Healthy subjects to --test on need anatomies of their own: give --held-out, and "
            "--label-maps."
        )
    kept = len(maps) - held_out
    apart = maps[kept:] if held_out else maps
    return {HEALTHY: maps[:kept], HELD_OUT: apart, PATIENT: apart}


def _check_numbers(counts, *, seed, voxel_size):
    flags = {HEALTHY: "--healthy", HELD_OUT: "--test", PATIENT: "--patients", HEADS: "--heads"}
    for kind, count in counts.items():
        if not 0 <= count <= MOST_SUBJECTS:
            raise InputError(f"Expected {flags[kind]} from 0 to {MOST_SUBJECTS}, got {count}.")
    if not any(counts.values()):
        raise InputError("Nothing to make: --healthy, --test, --patients and --heads are all 0.")
    if seed < 0:
        raise InputError(f"Expected --seed of 0 or more, got {seed}.")
    if not SMALLEST_VOXEL_MM <= voxel_size <= LARGEST_VOXEL_MM:
        raise InputError(
            f"Expected --voxel-size from {SMALLEST_VOXEL_MM} to {LARGEST_VOXEL_MM} mm, "
            f"got {voxel_size}."
        )


def _groups(subjects):
    """CSV of the anatomy of each scan, for --groups of the evaluation."""
    names = [Path(entry["scan"]).name.rsplit("_", 1)[0] for entry in subjects]
    anatomies = [entry["anatomy"] for entry in subjects]
    lines = map(",".join, zip(names, anatomies, strict=True))
    return "\n".join(["scan,group", *lines]) + "\n"


def _write_subject(folder, kind, number, label_maps, seed, voxel_size, lesions):
    """Make and write one subject; returns its entry of phantom.json."""
    from preprocessing.phantom.subject import make_phantom

    options = {"voxel_size": voxel_size, "label_maps": label_maps, "lesions": lesions}
    phantom = make_phantom(seed, kind, number, **options)
    entry = {"kind": KIND_NAMES[kind]}
    volumes = {"scan": phantom.image, "segmentation": phantom.label, "twin": phantom.twin}
    paths = subject_files(kind, number, lesions)
    for (name, values), path in zip(volumes.items(), paths, strict=False):
        write_nifti(folder / path, values, phantom.affine)
        entry[name] = path.as_posix()
    return {**entry, **phantom.facts}


def _write_head(folder, label_maps, seed, number, voxel_size):
    """Paint and write one head; returns its entry of phantom.json."""
    from preprocessing.phantom.heads.anatomy import load_heads
    from preprocessing.phantom.heads.write import write_head

    return write_head(folder, load_heads(label_maps), seed, number, fine_mm=voxel_size)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write a cohort; returns the exit status."""
    parser = parser_for(
        "python -m preprocessing.phantom",
        "Synthesize healthy T2-like scans and patients with lesions, as NIfTI files.",
        epilog=EXAMPLE,
    )
    add(parser, "--out", required=True, help="folder to make")
    add(parser, "--healthy", "--patients", required=True)
    add(parser, "--seed", required=True, default=None, help="same seed, same files")
    add(parser, "--lesions", "--label-maps", "--held-out", "--test")
    add(parser, "--heads", default=0, type=int, help="number of whole heads, of label maps")
    add(parser, "--voxel-size", default=1.0, help="mm, 0.5 to 4")
    add(parser, "--jobs")
    add(parser, "--force", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    check_effect(parser, args, {"--lesions": ("--patients", args.patients > 0)})
    options = vars(args)
    made = write_cohort(options.pop("out"), **options)
    print(
        f"{made['healthy'] + made['test']} healthy subjects and {made['patients']} patients, "
        f"{len(made['heads'])} heads, {made['voxel_size']:g} mm, seed {made['seed']}."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
