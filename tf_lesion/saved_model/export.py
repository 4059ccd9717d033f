"""Export a model as a SavedModel that runs where only TensorFlow is installed.

    python -m tf_lesion.export --model runs/gmvae --out exported --thresholds limits.json --verify

Its signatures are listed in tf_lesion/signatures.py, what travels with it in tf_lesion/exported.py.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tf_lesion import __version__
from tf_lesion.caches.slices import BRAIN_FLOOR, HIGHEST_PERCENTILE, LOWEST_PERCENTILE
from tf_lesion.choices import FILE_NAME as LAMBDA
from tf_lesion.choices import THRESHOLD_FILES, read_thresholds, restoration_of
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.config import SOLVERS
from tf_lesion.files import InputError, refuse_existing, written_whole
from tf_lesion.provenance import commit

VERIFIED_STEPS = 20  # of `restore`
VERIFIED_SLICES = 3
VERIFIED_SEED = 7
VERIFIER = """
import sys
import numpy as np
import tensorflow as tf

folder, given, found = sys.argv[1:]
saved = tf.saved_model.load(folder)
inputs, outputs = np.load(given), {}
for name, signature in saved.signatures.items():
    tensors = {key.split("/")[1]: inputs[key] for key in inputs if key.startswith(name + "/")}
    for output, values in signature(**tensors).items():
        outputs[f"{name}/{output}"] = values.numpy()
alone = {"tf_lesion", "tensorflow_probability"}.isdisjoint(sys.modules)
np.savez(found, alone=alone, **outputs)
"""


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tf_lesion.export", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="run of train_gmvae.py, or folder of a TF1 checkpoint")
    add("--out", required=True, type=Path, help="folder of the SavedModel")
    add(
        "--thresholds",
        type=Path,
        help="JSON of eval.thresholds: `detect` gives lesion maps; default: the run's own "
        "thresholds.json, if it has one",
    )
    add(
        "--tv-weight",
        help="lambda of `detect`, per unit intensity, or auto: that of eval.select_lambda; "
        "default: that of --thresholds, else the preset's",
    )
    add("--steps", type=int, help="of `detect`; default: those of --thresholds, else the preset's")
    add(
        "--solver",
        choices=list(SOLVERS),
        help="in the graph; default: that of --thresholds, else the preset's (gmvae, vae)",
    )
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    add("--verify", action="store_true", help="compare with the model in a fresh interpreter")
    add("--force", action="store_true", help="replace the SavedModel at --out")
    return parser.parse_args(argv)


def export(loaded, out, *, restoration, thresholds=None, thresholds_path=None, force=False):
    """Write a model as a SavedModel, whole or not at all.

    Args:
        loaded: `runs.LoadedModel` of a run or a TF1 checkpoint.
        out: the folder to make.
        restoration: `RestorationConfig`: the defaults of the exported model.
        thresholds: as `choices.read_thresholds` gives, or None.
        thresholds_path: the file that they are from, which travels along.
        force: replace the SavedModel at `out`.

    Raises:
        FileExistsError: if `out` exists and `force` is false.
    """
    import numpy as np
    import tensorflow as tf

    from tf_lesion.files import write_json
    from tf_lesion.saved_model import exported

    made = signatures_of(loaded, restoration, thresholds)
    module = tf.Module(name="tf_lesion")
    module.tensors = [weight.value for weight in loaded.model.weights]
    for name, signature in made.items():
        setattr(module, name, signature)
    with tempfile.TemporaryDirectory() as scratch, written_whole(out, force=force) as folder:
        files = Path(scratch)
        write_json(
            files / exported.SETTINGS, describe_export(loaded, restoration, made, thresholds)
        )
        if loaded.reference is not None:
            np.save(files / exported.REFERENCE, np.asarray(loaded.reference, np.float32))
        copies = {LAMBDA: loaded.extras / LAMBDA, exported.THRESHOLDS: thresholds_path}
        for name, source in copies.items():
            if source is not None and source.exists():
                shutil.copyfile(source, files / name)
        module.files = {path.name: tf.saved_model.Asset(str(path)) for path in files.iterdir()}
        tf.saved_model.save(module, str(folder), signatures=made)


def signatures_of(loaded, restoration, thresholds):
    """`signatures.signatures` of a loaded model."""
    from tf_lesion.saved_model.signatures import signatures

    limits = {name: point["threshold"] for name, point in (thresholds or {}).items()}
    return signatures(loaded.model, restoration, reference=loaded.reference, thresholds=limits)


def describe_export(loaded, restoration, made, thresholds):
    """The content of model.json."""
    import keras
    import tensorflow as tf

    from tf_lesion.saved_model.signatures import DETECTION_SEED, lesion_output

    config = loaded.config.replace(restoration=restoration)
    return {
        "tf_lesion_version": __version__,
        "tensorflow_version": tf.__version__,
        "keras_version": keras.__version__,
        "commit": commit(),
        "model_identity": loaded.identity,
        "model_path": loaded.path,
        "has_lambda": loaded.model.has_lambda,
        "has_steps": loaded.model.has_steps,
        "preset": config.preset,
        "tv_weight": restoration.tv_weight,
        "detect": {
            "steps": restoration.steps,
            "tv_weight": restoration.tv_weight,
            "seed": DETECTION_SEED,
            "normalized_between_percentiles": [LOWEST_PERCENTILE, HIGHEST_PERCENTILE],
            "least_intensity_in_brain": BRAIN_FLOOR,
            "matched_to_reference": loaded.reference is not None,
            "thresholds": {
                lesion_output(name): point for name, point in (thresholds or {}).items()
            },
        },
        "signatures": {name: _described(signature) for name, signature in made.items()},
        "config": config.to_dict(),
        "data": loaded.data,
    }


def _described(signature):
    concrete = signature.get_concrete_function()
    inputs = {spec.name: _shape_and_type(spec) for spec in signature.input_signature}
    outputs = {
        name: _shape_and_type(spec) for name, spec in sorted(concrete.structured_outputs.items())
    }
    return {"inputs": inputs, "outputs": outputs}


def _shape_and_type(spec):
    return {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}


# Verification -----------------------------------------------------------------------------------


def verify(loaded, out, *, restoration, thresholds=None):
    """Compare every output of a SavedModel, loaded in a fresh interpreter, with the model's.

    `restore` (20 steps) and `detect` are compared with `Restorer`, the rest with the functions
    that were exported.

    Returns:
        {"signature/output": largest absolute difference; NaN where one of the two is missing}.

    Raises:
        InputError: if the fresh interpreter cannot run it.
    """
    import numpy as np

    inputs = example_inputs(loaded, restoration)
    expected = expected_outputs(loaded, inputs, restoration=restoration, thresholds=thresholds)
    with tempfile.TemporaryDirectory() as scratch:
        given, found = (str(Path(scratch) / name) for name in ("given.npz", "found.npz"))
        flat = {f"{name}/{key}": v for name, group in inputs.items() for key, v in group.items()}
        np.savez(given, **flat)
        done = subprocess.run(
            [sys.executable, "-I", "-c", VERIFIER, str(out.resolve()), given, found],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{out} does not run in a fresh interpreter: {last}")
        with np.load(found) as stored:
            outputs = dict(stored)
    if not outputs.pop("alone"):
        raise InputError(f"{out} loaded tf_lesion or tensorflow_probability; it should not.")
    return {
        name: _difference(expected.get(name), outputs.get(name))
        for name in sorted({*expected, *outputs})
    }


def _difference(ours, theirs):
    import numpy as np

    if ours is None or theirs is None or ours.shape != theirs.shape:
        return float("nan")
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def example_inputs(loaded, restoration):
    """{signature: {input: array}}: noisy ellipses of different brightness."""
    import numpy as np

    network = loaded.config.network
    shape = (network.height, network.width)
    place = [np.linspace(-1, 1, length) for length in shape]
    radius = np.hypot(*np.meshgrid(*place, indexing="ij"))
    rng = np.random.default_rng(VERIFIED_SEED)
    count = VERIFIED_SLICES
    noise = rng.uniform(0.3, 0.7, (count, *shape)) + rng.uniform(0, 0.3, (count, 1, 1))
    mask = np.broadcast_to(radius < rng.uniform(0.7, 0.95, (count, 1, 1)), noise.shape)[..., None]
    observed = (noise[..., None] * mask).astype(np.float32)
    slices, seed = np.arange(count, dtype=np.int64) * 11, np.int64(VERIFIED_SEED)
    brain, weight = mask.astype(np.float32), np.float32(restoration.tv_weight)
    steps = np.int32(VERIFIED_STEPS)
    common = {"observed": observed, "mask": brain, "slices": slices, "tv_weight": weight}
    ascent = {"image": observed, "start": np.int32(0), "stop": steps, "seed": seed}
    return {
        "restore": {**common, "steps": steps, "seed": seed},
        "ascend": {**common, **ascent},
        "detect": {"raw": observed * np.float32(1000), "mask": brain},
        "reconstruct": {"image": observed},
        "elbo": {"image": observed, "slices": slices, "seed": seed},
    }


def expected_outputs(loaded, inputs, *, restoration, thresholds=None):
    """{"signature/output": array} of the model in memory."""
    import dataclasses

    import numpy as np

    from tf_lesion.restoration import Restorer, detect, restore
    from tf_lesion.saved_model.intensity import prepared
    from tf_lesion.saved_model.signatures import DETECTION_SEED, lesion_output

    made = signatures_of(loaded, restoration, thresholds)
    outputs = {
        f"{name}/{key}": values.numpy()
        for name in set(made) - {"restore", "detect"}
        for key, values in made[name](**inputs[name]).items()
    }
    given, few = inputs["restore"], dataclasses.replace(restoration, steps=VERIFIED_STEPS)
    mask = given["mask"]

    def restored(name, observed, slices, settings, seed):
        images, _ = restore(Restorer(loaded.model, settings, seed=seed), observed, mask, slices)
        outputs[f"{name}/restored"] = images
        outputs[f"{name}/residual"] = np.abs(observed - images) * mask
        return images

    restored("restore", given["observed"], given["slices"], few, int(given["seed"]))
    observed = prepared(inputs["detect"]["raw"], mask > 0, loaded.reference).numpy()
    outputs["detect/observed"] = observed
    images = restored("detect", observed, range(len(mask)), restoration, DETECTION_SEED)
    for name, point in (thresholds or {}).items():
        found = detect(observed, images, mask, point["threshold"])
        outputs[f"detect/{lesion_output(name)}"] = found
    return outputs


# The command ------------------------------------------------------------------------------------


def own_thresholds(loaded):
    """Path of the thresholds in the run's own folder, if they hold for its own restoration."""
    path = loaded.extras / THRESHOLD_FILES["residual"]
    if not path.exists():
        return None
    try:
        _, healthy = read_thresholds(loaded, path)
    except InputError as error:
        print(f"No lesion maps: {error}", file=sys.stderr)
        return None
    same = all(
        healthy.get(name) == getattr(loaded.config.restoration, name)
        for name in ("tv_weight", "solver", "steps")
    )
    return path if same else None


def resolve(loaded, options):
    """(`RestorationConfig`, thresholds or None) of the command line.

    Raises:
        InputError: if lambda or steps are not those that the thresholds were made with.
    """
    given = {name: getattr(options, name) for name in ("tv_weight", "steps", "solver")}
    if options.thresholds is None and not any(given.values()):
        options.thresholds = own_thresholds(loaded)
    if options.thresholds is None:
        return restoration_of(loaded, **given), None
    thresholds, healthy = read_thresholds(loaded, options.thresholds)
    meaningful = [
        *(["tv_weight", "solver"] if loaded.model.has_lambda else []),
        *(["steps"] if loaded.model.has_steps else []),
    ]
    for name in meaningful:
        given[name] = healthy.get(name) if given[name] is None else given[name]
    restoration = restoration_of(loaded, **given)
    for name in meaningful:
        if healthy.get(name, getattr(restoration, name)) != getattr(restoration, name):
            raise InputError(
                f"{options.thresholds} was made with {name} {healthy[name]}, not "
                f"{getattr(restoration, name)}; the false positive rates hold only there."
            )
    if healthy.get("precision", options.precision) != options.precision:
        print(
            f"warning: {options.thresholds} was made in {healthy['precision']}, the SavedModel "
            f"computes in {options.precision}.",
            file=sys.stderr,
        )
    return restoration, thresholds


def check_out(out, *, force):
    """Refuse what exists, and with --force whatever is not a SavedModel: it would be deleted."""
    from tf_lesion.saved_model.exported import is_exported

    refuse_existing(out, force=force)
    if out.exists() and not is_exported(out):
        raise InputError(f"Expected a SavedModel to replace at {out}; choose another --out.")


@command
def main(argv=None):
    """Run the command line; returns the exit status."""
    options = parse(argv)
    refuse_existing(options.out, force=options.force)
    from tf_lesion.saved_model import exported
    from tf_lesion.training import runs

    check_out(options.out, force=options.force)
    if exported.is_exported(options.model):
        raise InputError(f"Expected a run to export, {options.model} is a SavedModel already.")
    loaded = runs.load(options.model, precision=options.precision)
    restoration, thresholds = resolve(loaded, options)
    export(
        loaded,
        options.out,
        restoration=restoration,
        thresholds=thresholds,
        thresholds_path=options.thresholds,
        force=options.force,
    )
    print(f"Exported {options.model} ({loaded.identity}): {options.out}")
    if not options.verify:
        return 0
    differences = verify(loaded, options.out, restoration=restoration, thresholds=thresholds)
    print(verdict(differences))
    return int(any(difference != 0 for difference in differences.values()))


def verdict(differences):
    """The differences as text, a line per output."""
    lines = [f"{name:32} {value:.1e}" for name, value in differences.items()]
    largest = max(differences.values(), key=lambda value: float("inf") if value != value else value)
    return "\n".join([*lines, f"largest difference, fresh interpreter to memory: {largest:.1e}"])


if __name__ == "__main__":
    sys.exit(main())
