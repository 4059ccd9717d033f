"""Parity with the released graph: its checkpoints, its numbers, and a comparison that can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, golden

from eval.compare_numbers import compare, quantities
from tf_lesion import tf1
from tf_lesion.files import InputError
from tf_lesion.prior import load

ROOT = Path(__file__).parent.parent
FILES = ["gmvae_k6_forward", "gmvae_k6_restore", "gmvae_k6_train", "vae_forward", "vae_restore"]


def _compare(checkpoint, reference):
    """Run the command as a user would: in a process that it sets up itself."""
    environment = {name: value for name, value in os.environ.items() if "ONEDNN" not in name}
    command = [sys.executable, "-m", "eval.compare_tf1", "--tf1-checkpoint", str(checkpoint)]
    return subprocess.run(
        [*command, "--reference", str(reference)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


SLOW = ("gmvae_k6_train", "gmvae_k6_restore", "vae_forward", "vae_restore")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FILES]
)
def test_every_quantity_of_the_released_graph_is_reproduced(name):
    kind = name.rsplit("_", 1)[0]
    run = _compare(GOLDEN / f"{kind}_ckpt", GOLDEN / f"{name}.npz")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.split() for line in run.stdout.splitlines()[1:-1]]
    assert {row[-1] for row in rows} == {"yes"}
    inputs = {"x", "observed", "mask", "eps_w", "eps_z", "tv_weight", "num_clusters", "c_lambda"}
    inputs |= {"step_size", "clip", "learning_rate"}
    assert {row[0] for row in rows} == set(golden(f"{name}.npz")) - inputs


@pytest.mark.slow
def test_a_changed_number_and_one_nobody_computes_fail_and_are_named(tmp_path):
    reference = golden("vae_forward.npz")
    reference["z_mean"] = reference["z_mean"] * 1.001
    np.savez(tmp_path / "changed.npz", **reference, loss_unheard_of=np.float32(1))
    run = _compare(GOLDEN / "vae_ckpt", tmp_path / "changed.npz")
    assert run.returncode == 1
    failed = [line.split()[0] for line in run.stdout.splitlines() if line.endswith("NO")]
    assert failed == ["loss_unheard_of", "z_mean"]


def test_log_precision_is_compared_where_the_released_code_clips_it():
    model, config = tf1.load(GOLDEN / "gmvae_k6_ckpt")
    head = model.decoder.log_precision_head.bias
    head.assign(head + 33)  # the largest of .4 to 8.7 pass 36.84, the sigma of 1e-8
    reference = golden("gmvae_k6_forward.npz")
    inside = reference["y_logvarinv"] + 33
    found = quantities(model, config, reference)
    assert found["y_logvarinv"].numpy().max() > 40
    for values, passes in (
        (np.clip(inside, 0, 36.841361), True),  # as the released graph has it
        (inside, True),
        (np.where(inside < 35, inside + 0.01, inside), False),
        (np.clip(inside, 0, 36), False),
    ):
        row = compare(found, {"y_logvarinv": values})
        assert row.passed.tolist() == [passes], row


def test_model_and_clusters_are_read_from_the_checkpoint():
    loaded = load(GOLDEN / "gmvae_k6_ckpt")
    network = loaded.config.network
    assert (network.model, network.num_clusters, loaded.config.preset) == ("gmvae", 6, "released")
    assert load(GOLDEN / "vae_ckpt").config.network.model == "vae"


def test_every_weight_is_loaded_exactly_once():
    loaded = load(GOLDEN / "gmvae_k6_ckpt")
    names = tf1.variable_names(loaded.model)
    assert len(names) == len(loaded.model.weights) == 42
    assert {id(value) for value in names.values()} == {id(w) for w in loaded.model.weights}


def test_a_checkpoint_of_another_k_or_model_is_refused():
    _, config = tf1.read_config(GOLDEN / "gmvae_k6_ckpt")
    with pytest.raises(InputError, match=r"shape .*, expected .*another number of clusters"):
        tf1.load(GOLDEN / "gmvae_k6_ckpt", config=config.replace(network={"num_clusters": 9}))
    with pytest.raises(InputError, match=r"no variable q_zx/z_mean.*; it is no vae"):
        tf1.load(GOLDEN / "gmvae_k6_ckpt", config=config.replace(network={"model": "vae"}))


def test_the_checkpoint_is_chosen_by_its_name_and_step_never_by_the_time_of_its_file(
    tmp_path, capsys
):
    for step in (799, 90, 1000):
        for file in GOLDEN.glob("vae_ckpt/model.ckpt-799.*"):
            copy = tmp_path / file.name.replace("799", str(step))
            shutil.copy(file, copy)
            os.utime(copy, (0, 1e9 - step))  # the newest by time is the first
    assert tf1.read_config(tmp_path)[0] == str(tmp_path / "model.ckpt-1000")
    for named in ("/cluster/alice/run/model/model.ckpt-799", "C:\\runs\\model.ckpt-799"):
        escaped = named.replace("\\", "\\\\")
        (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{escaped}"\n')
        assert tf1.read_config(tmp_path)[0] == str(tmp_path / "model.ckpt-799")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/cluster/model.ckpt-7"\n')
    load(tmp_path)
    assert f"Of several checkpoints: {tmp_path}/model.ckpt-1000" in capsys.readouterr().err


def test_a_model_subfolder_as_the_released_code_makes_it_is_found(tmp_path):
    shutil.copytree(GOLDEN / "vae_ckpt", tmp_path / "run" / "model")
    assert load(tmp_path / "run").config.network.model == "vae"


def test_a_folder_without_any_model_says_what_was_expected(tmp_path):
    with pytest.raises(
        InputError, match=r"a run of tf-lesion train .*, a folder with a TF1 .* or a SavedModel"
    ):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="No model at"):
        load(tmp_path / "nowhere")
