r"""What the restoration changes in healthy brains, place by place in MNI space.

The maps are for `restore_brats.py --postprocess normalize`: ventricles, vessels and the edge of the
brain change in healthy subjects too, and are no lesions.

    python -m eval.healthy_residual --model runs/gmvae --cache healthy.h5 \
        --restored thresholds.healthy.h5

The restored slices are those that eval.thresholds leaves beside its output.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.thresholds import model_id
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.detection.postprocessing import HEALTHY_FILE, HealthyResidual, save_maps
from tf_lesion.evaluation.scores import Cohort, cache_axes_mm
from tf_lesion.files import InputError, refuse_existing


def healthy_maps(cohort, *, progress=True):
    """`HealthyMaps` of the restored slices of healthy subjects, in blocks.

    Args:
        cohort: `Cohort`.
        progress: show a progress bar.

    Raises:
        InputError: if the cache does not say where its slices lie.
    """
    with cohort.open_cache() as cache:
        voxel_size = np.abs(np.diag(cache.grid_affine)[:3]) if cache.grid_affine is not None else 1
        depth = int(cache.index.slice_index.max()) + 1
        found = HealthyResidual(np.array([*cache.slice_shape, depth]) * voxel_size)
        subjects = cohort.subjects(with_truth=False)
        for subject in tqdm(subjects, "healthy maps", unit="subject", disable=not progress):
            axes = cache_axes_mm(cache, subject.rows)
            found.add(subject.observed, subject.restored, subject.mask, axes)
    return found.maps()


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.healthy_residual", description=__doc__, formatter_class=HelpFormatter
    )
    add = arguments.add_argument
    add("--model", required=True, help="run that restored the slices")
    add("--cache", required=True, type=Path, help="healthy cache (dataset Test)")
    add("--restored", required=True, type=Path, help="its restored slices")
    add("--out", type=Path, help=f"file to write; default: {HEALTHY_FILE} in the --model folder")
    add("--force", action="store_true", help="overwrite --out")
    return arguments


@command
def main(argv=None):
    """Measure healthy change and write its maps."""
    options = parser().parse_args(argv)
    out = options.out or Path(options.model) / HEALTHY_FILE
    refuse_existing(out, force=options.force)
    from tf_lesion.training.runs import load

    identity, cohort = load(options.model).identity, Cohort(options.restored, options.cache)
    if model_id(cohort.settings) != identity:
        raise InputError(
            f"{options.restored} was restored by model {model_id(cohort.settings)}, "
            f"{options.model} is {identity}."
        )
    save_maps(healthy_maps(cohort), out, force=options.force)
    print(f"Wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
