"""Every option of every command, declared once: a command takes those it needs by name.

    parser = parser_for("tf-lesion train", DESCRIPTION)
    add(parser, "--cache", "--out", "--crop")
    add(parser, "--steps", help="of training; default: the preset's")

A command may give a help, a default or `required` of its own; type and form are the table's.
"""

import argparse
from pathlib import Path
from typing import Any

from tf_lesion.config import PRESET_NAMES
from tf_lesion.scans import ALIGN_MODES

METHOD_NAMES = "gmvae, vae, vae-256, vae-128, aae-128, anogan or denoiser"
SOLVER_NAMES = ("released", "multirate", "huber", "denoiser", "red")
PRECISION_NAMES = ("float32", "bfloat16", "tf32")
GRADE_NAMES = ("LGG", "HGG")  # in the order of the paper's evaluation
CONNECTIVITIES = (6, 18, 26)
CROP = ("X0", "X1", "Y0", "Y1")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of the example and shows the defaults that say something."""

    def _get_help_string(self, action):
        told = "default" in (action.help or "")
        if told or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) from "i/n", 1 <= i <= n."""
    number, count = (int(part) for part in text.split("/"))
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text}")
    return number, count


def counted(text: str) -> int:
    """A whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return number


def _flag(text):
    return {"action": "store_true", "help": text}


OPTIONS: dict[str, dict[str, Any]] = {
    # files
    "--model": {"help": "pretrained, a run, a folder of a TF1 checkpoint, or a SavedModel"},
    "--cache": {"type": Path, "help": "HDF5 cache of slices"},
    "--input": {"help": "T2 scan (NIfTI, DICOM folder or zip), a folder of scans, or BIDS"},
    "--restored": {"type": Path, "help": "restored slices of restore_brats.py"},
    "--results": {"type": Path, "help": "maps of restore_brats.py --input or tf-lesion detect"},
    "--out": {"type": Path, "help": "file or folder to write"},
    "--calibration": {
        "also": "--thresholds",  # as it was called
        "type": Path,
        "help": "of tf-lesion calibrate, for lesion masks; default: the model's own (scans)",
    },
    "--config": {"type": Path, "help": "YAML, see eval/experiment.yaml"},
    "--force": _flag("overwrite --out"),
    "--verbose": {
        **_flag("say how long each stage took, and where errors came from"),
        "also": "-v",
    },
    "--quiet": {**_flag("say only what failed; the log says all"), "also": "-q"},
    "--dry-run": _flag("say what would be done, and leave"),
    # devices
    "--device": {"default": "auto", "help": "cpu, gpu, gpu:N or auto"},
    "--threads": {"type": counted, "help": "most processor threads; default: all cores"},
    "--precision": {"choices": PRECISION_NAMES, "default": "float32", "help": "of convolutions"},
    "--distribute": {
        "choices": ["none", "mirrored", "multi-worker"],
        "default": "none",
        "help": "mirrored: all GPUs of this machine; multi-worker: this is one of several "
        "processes that TF_CONFIG or SLURM names; the batch size is that of all together",
    },
    "--jobs": {"type": counted, "default": 1, "help": "processes"},
    # slices
    "--crop": {
        "type": int,
        "nargs": 4,
        "metavar": CROP,
        "help": "window, pixels; default: the cache's",
    },
    "--subjects": {"type": Path, "help": "slices per subject (.npy), for a released cache"},
    "--groups": {
        "type": Path,
        "help": "CSV with the columns scan and group: intervals draw the scans of one group, such "
        "as a phantom's anatomy, together; default: sessions of one subject are a group",
    },
    "--connectivity": {
        "type": int,
        "choices": CONNECTIVITIES,
        "default": CONNECTIVITIES[-1],
        "help": "neighbors of a voxel that belong to its lesion",
    },
    "--smallest-lesion": {
        "type": float,
        "default": 0.0,
        "metavar": "ML",
        "help": "count no smaller components, of lesions and of what is detected",
    },
    "--overlap": {
        "type": float,
        "default": 0.0,
        "metavar": "SHARE",
        "help": "a lesion is found if more than this of it is detected; 0: one voxel is enough",
    },
    "--labels": {"type": Path, "help": "file with Label, for a cache without"},
    "--max-slices": {"type": counted, "help": "a random subset, drawn with --seed; default: all"},
    "--batch-size": {"type": counted, "default": 16, "help": "slices at once"},
    "--shard": {"type": shard_of, "metavar": "I/N", "help": "only the I-th of N parts (--cache)"},
    "--merge": _flag("put the shards of --out together"),
    "--save-every": {"type": counted, "help": "keep the images every so many steps (gmvae, vae)"},
    "--slice-step": {"type": counted, "default": 1, "help": "take every n-th axial slice"},
    "--seed": {"type": int, "default": 0, "help": "of the noise"},
    # training
    "--preset": {"choices": PRESET_NAMES, "help": "settings (default: released)"},
    "--steps": {"type": int, "help": "of the restoration or search; default: the preset's"},
    "--learning-rate": {"type": float, "help": "of Adam"},
    "--clusters": {"type": int, "help": "K, clusters of the mixture"},
    "--checkpoint-every": {"type": counted, "help": "steps between checkpoints"},
    "--resume": _flag("go on from the newest checkpoint in --out"),
    # restoration
    "--tv-weight": {"help": "lambda, per unit intensity, or auto: that of the calibration"},
    "--solver": {
        "choices": SOLVER_NAMES,
        "help": "released: 500 steps; multirate: the same with 100 gradients of the ELBO; huber: "
        "50 long steps without jitter; denoiser: one step; red: several, with total variation; "
        "default: the preset's",
    },
    "--postprocess": {
        "metavar": "STEPS",
        "help": "such as seeds=4,signed,median=3, none, or auto: what the model comes with",
    },
    # calibration
    "--grid-steps": {"type": int, "help": "of the restoration for --grid; default: the preset's"},
    "--grid-slices": {"type": counted, "help": "a random subset for --grid; default: all"},
    "--chosen-by": {"metavar": "TEXT", "help": "what --tv-weight and --postprocess came from"},
    "--grid": {"help": "lambdas, start:stop:step without the stop, or a,b,c"},
    "--targets": {"type": float, "nargs": "+", "help": "largest healthy false positive rates"},
    "--method": {
        "choices": ["exact", "golden"],
        "default": "exact",
        "help": "thresholds by order statistics, or by the released search",
    },
    # scans
    "--pattern": {"help": "glob of the scans in a folder; default: BIDS and BRATS names"},
    "--mask-pattern": {"help": "glob of their brain masks, with {subject} and {folder}"},
    "--seg-pattern": {"help": "the same for true segmentations"},
    "--mask": {"type": Path, "help": "brain mask of the one scan, NIfTI on its grid"},
    "--series": {
        "metavar": "N|TEXT",
        "help": "DICOM series to take, by number or description; default: the T2-weighted one",
    },
    "--participant-label": {"nargs": "+", "help": "participants of a BIDS dataset; default: all"},
    "--align": {"choices": ALIGN_MODES, "help": "to MNI space; default: as the training scans"},
    "--allow-poor-alignment": _flag(
        "go on with a warning where the brain or its alignment is not to be trusted"
    ),
    "--bids-out": _flag("write --out as BIDS derivatives"),
    "--voxel-size": {"type": float, "help": "mm of the grid"},
    # cohorts
    "--n4": _flag("correct the bias field"),
    "--min-brain": {
        "type": float,
        "default": 0.0,
        "help": "keep slices with more than this fraction of the crop in the brain",
    },
    "--limit": {"type": counted, "help": "only the first N subjects"},
    "--test-subjects": {
        "type": int,
        "help": "subjects held out, exactly; default: 8 %% of all, at least 1 (52 of 652)",
    },
    "--test-list": {
        "type": Path,
        "help": "file with the names of the subjects held out, one a line, instead of a number",
    },
    "--match": _flag(
        "histogram-match the healthy subjects to the reference too: for scans of several "
        "scanners, whose min-max intensities differ (the paper's come from one)"
    ),
    "--no-matching": _flag("do not match histograms"),
    "--grade": {"choices": (*GRADE_NAMES, "all"), "default": "all", "help": "all: LGG first"},
    "--no-labels": _flag("do without segmentations"),
    "--healthy": {"type": int, "help": "number of healthy subjects"},
    "--patients": {"type": int, "help": "number of patients"},
    "--lesions": {
        "choices": ("glioma", "stroke", "ms"),
        "default": "glioma",
        "help": "what the patients have; ms: multiple sclerosis",
    },
    "--heads": {"type": counted, "help": "number of painted heads"},
    "--stages": {"nargs": "+", "help": "only these"},
    "--label-maps": {
        "type": Path,
        "help": "folder of FreeSurfer label maps to use as anatomies instead of ICBM152",
    },
    "--held-out": {
        "type": int,
        "default": 0,
        "help": "label maps, the last by name, kept for patients and for --test",
    },
    "--test": {
        "type": int,
        "default": 0,
        "help": "further healthy subjects, of the label maps held out",
    },
    "--caches": {"type": Path, "nargs": "+", "help": "caches to compare, .h5"},
    "--datasets": {
        "choices": ("Train", "Test"),
        "nargs": "+",
        "default": ["Test"],
        "help": "dataset of each cache, or one for all",
    },
    # comparison with TensorFlow 1
    "--tf1-checkpoint": {"type": Path, "help": "folder of model.ckpt-STEP.*"},
    "--reference": {"type": Path, "help": "what to compare with, or to match intensities to"},
    "--tf1-restored": {"type": Path, "help": "HDF5 file, or folder of .npy batches"},
    "--tf1-statistics": {"type": Path, "help": "LGsta.npy, HGsta.npy or the folder of one of them"},
    # benchmark
    "--rounds": {"type": counted, "help": "times each way is timed; default: 3 to 9"},
    "--size": {"type": int, "nargs": 2, "metavar": ("H", "W"), "help": "of slices, pixels"},
    "--voxels": {"type": counted, "help": "number of voxels (metrics)"},
    # export
    "--verify": _flag("compare with the model in a fresh interpreter"),
    "--as": {"choices": ["savedmodel", "run"], "default": "savedmodel", "help": "what to write"},
    # evaluation
    "--protocol": {
        "choices": ["all", "released"],
        "default": "all",
        "help": "all scores as thresholds, or the 401 of the released code",
    },
    "--tables-only": _flag("leave the figures out"),
    "--pdf": _flag("write pictures as PDF too"),
    "--compare": {"metavar": "STEPS", "help": "measure each post-processing step alone, and all"},
    "--all-combinations": _flag("--compare every combination of its steps"),
    "--truth": {"type": Path, "help": "segmentation of the one scan; default: that beside it"},
    "--scan": {"type": Path, "help": "the one scan, if it has moved"},
    "--evaluation": {"type": Path, "help": "--out of tf-lesion evaluate: the cohort's ROC curve"},
    "--target-fpr": {
        "type": float,
        "default": 0.01,
        "help": "show the threshold with this share of healthy voxels above it, a fraction",
    },
    "--seg": {"type": Path, "help": "segmentation of the one scan, NIfTI on its grid"},
}


def parser_for(prog: str | None, description: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the house's help."""
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=HelpFormatter
    )


def add(parser: Any, *names: str, **changes: Any) -> None:
    """Add options of `OPTIONS` to a parser or group, all with the same `changes`.

    Raises:
        KeyError: if a name is not in the table.
    """
    for name in names:
        options = {**OPTIONS[name], **changes}
        called = (name, options.pop("also")) if "also" in options else (name,)
        parser.add_argument(*called, **options)
