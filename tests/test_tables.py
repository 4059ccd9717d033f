"""The whole experiment: its configuration, its parts, and the tables and figures it ends in."""

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import write_cache
from matplotlib import pyplot as plt

from eval import figures, paper, tables
from eval.experiment import read_experiment
from eval.parts import Part, measured_rates, plan
from eval.pipeline import MethodParts
from tf_lesion.calibration import Calibration
from tf_lesion.cli import evaluate
from tf_lesion.files import InputError, locked
from tf_lesion.training.trainer import Trainer

EXAMPLES = Path(tables.__file__).parent
FIGURES = ("fig1", "fig2a", "fig2b", "fig2c", "fig3", "fig4", "fig5", "fig6")


def settings(folder):
    """A tiny experiment on caches in `folder`."""
    return {
        "out": str(folder / "experiment"),
        "healthy": str(folder / "healthy.h5"),
        "patients": {"LGG": str(folder / "lgg.h5"), "HGG": str(folder / "hgg.h5")},
        "preset": "practical",
        "network": {"num_filters": 4, "precision": "float32"},
        "training": {"steps": 6, "batch_size": 4, "checkpoint_every": 3},
        "methods": [{"method": "gmvae", "clusters": 2}, {"method": "vae"}],
        "restoration": {"steps": 4, "batch_size": 8, "save_every": 2},
        "lambda": {"grid": [0.6, 1.8], "max_slices": 4},
        "thresholds": {"max_slices": 6},
        "sweep": {"grid": [0.6, 1.8], "max_slices": 3},
        "figures": {"cases": 3},
    }


def write(folder, values, name="experiment.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    write_cache(folder / "healthy.h5", train=12, test=8)
    write_cache(folder / "lgg.h5", train=0, test=4, seed=5)
    write_cache(folder / "hgg.h5", train=0, test=4, seed=9)
    return folder


@pytest.fixture(scope="module")
def finished(caches, tmp_path_factory):
    """(configuration, folder) of an experiment from beginning to end."""
    out = tmp_path_factory.mktemp("finished") / "experiment"
    config = write(caches, {**settings(caches), "out": str(out)})
    assert tables.main(["--config", str(config)]) == 0
    return config, out


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Tables and figures ---------------------------------------------------------------------------


@pytest.mark.slow
def test_one_command_makes_every_table_and_figure(finished):
    _, out = finished
    for name in FIGURES:
        assert plt.imread(out / f"{name}.png").size
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for name in ("table1", "table2"):
        assert (out / f"{name}.md").exists()
        assert rows_of(out / f"{name}.csv")


@pytest.mark.slow
def test_table_1_holds_the_methods_the_baselines_and_the_papers_rows_marked(finished):
    rows = rows_of(finished[1] / "table1.csv")
    assert [row["method"] for row in rows[:4]] == [
        "GMVAE(TV), K = 2",
        "VAE(TV)",
        "histogram-equalized intensity",
        "intensity",
    ]
    ours, theirs = rows[:4], rows[4:]
    assert {row["data"] for row in ours} == {"this experiment"}
    assert {row["data"] for row in theirs} == {paper.DATA}
    empty = [key for row in ours[:2] for key, value in row.items() if not value]
    assert empty == ["clusters"]  # of the VAE
    assert ours[0]["clusters"] == "2"
    gmvae = next(row for row in theirs if row["method"] == "GMVAE(TV)")
    assert (gmvae["pooled_auc"], gmvae["mean_dice_dsc5"]) == ("0.83", "0.46")
    assert [row["method"] for row in rows_of(finished[1] / "pairs.csv")] == [
        "VAE(TV)",
        "histogram-equalized intensity",
        "intensity",
    ]
    text = (finished[1] / "table1.md").read_text()
    assert "Differences from GMVAE(TV), K = 2, mean over the same scans" in text
    assert "measured on other data" in text
    row = "| *GMVAE(TV) (paper: Cam-CAN, BRATS 2017)* | *1.80* | *0.37 ± 0.18* | *0.83* |"
    assert row in re.sub(" +", " ", text)


def _made(title, *, chosen_by=None, **numbers):
    """What `tables.pairs` asks of a method: its numbers of three scans by score."""
    scans = [
        pd.DataFrame(
            {"scan": ["a", "b", "c"], "score": score, **dict.fromkeys(tables.PAIRED, values)}
        )
        for score, values in {"equalized": 0.5, "intensity": 0.4, **numbers}.items()
    ]
    method = SimpleNamespace(title=title, chosen_by=chosen_by)
    return SimpleNamespace(method=method, scans=pd.concat(scans))


def test_methods_are_compared_on_the_same_scans(tmp_path):
    first = _made("GMVAE", residual=[0.1, 0.5, 0.9])
    better = _made("denoiser", residual=[0.2, 0.6, 1.0], chosen_by="labels of phantoms")
    experiment = SimpleNamespace(groups=None, seed=0)
    denoiser, equalized, _ = tables.pairs(experiment, [first, better])
    assert (denoiser["method"], denoiser["against"]) == ("denoiser †", "GMVAE")
    # The scans differ, the difference does not: its interval has no width.
    assert [denoiser[name] for name in ("auc", "auc_low", "auc_high")] == pytest.approx([0.1] * 3)
    assert equalized["auc"] == pytest.approx(0)
    assert equalized["auc_low"] < -0.1 < 0.1 < equalized["auc_high"]
    groups = tmp_path / "groups.csv"
    groups.write_text("scan,group\na,one\nb,one\nc,one\n")
    experiment = SimpleNamespace(groups=groups, seed=0)
    _, equalized, _ = tables.pairs(experiment, [first, better])
    assert equalized["auc_low"] == equalized["auc_high"]


@pytest.mark.slow
def test_table_2_holds_the_gmvaes_by_their_clusters(finished):
    rows = rows_of(finished[1] / "table2.csv")
    assert [(row["clusters"], row["data"]) for row in rows] == [
        ("2", "this experiment"),
        *((str(k), paper.DATA) for k in (3, 6, 9, 12)),
    ]


@pytest.mark.slow
def test_the_tables_numbers_are_those_of_the_commands(finished, caches, tmp_path):
    _, out = finished
    (patients,) = out.glob("parts/patients-vae-*")
    (calibrated,) = out.glob("parts/calibration-vae-*")
    argv = ["--restored", patients / "LGG.h5", patients / "HGG.h5"]
    argv += ["--cache", caches / "lgg.h5", caches / "hgg.h5", "--out", tmp_path]
    argv += ["--calibration", calibrated / "calibration.h5"]
    assert evaluate.main(list(map(str, argv))) == 0
    measured = json.loads((tmp_path / "metrics.json").read_text())["scores"]["residual"]
    row = rows_of(out / "table1.csv")[1]
    assert float(row["pooled_auc"]) == measured["pooled_auc"]
    for point in ("dsc_auc", "dsc1", "dsc5", "dsc10"):
        assert float(row[f"mean_dice_{point}"]) == measured[f"mean_dice_{point}"]
    chosen = Calibration.load(calibrated / "calibration.h5").tv_weight
    assert float(row["lambda"]) == chosen


@pytest.mark.slow
def test_the_last_step_of_figure_3_is_the_tables_auc(finished):
    _, out = finished
    (steps,) = out.glob("parts/steps-vae-*")
    curve = json.loads((steps / "steps.json").read_text())
    assert [point["step"] for point in curve] == [2, 4]
    assert curve[-1]["pooled_auc"] == float(rows_of(out / "table1.csv")[1]["pooled_auc"])


@pytest.mark.slow
def test_figures_name_their_axes_and_tell_lines_apart_without_color(finished, tmp_path, drawn):
    config, _ = finished
    experiment = read_experiment(config)
    methods = [MethodParts(experiment, method) for method in experiment.methods]
    figures.draw_lines(tmp_path, methods)
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for (axis,) in (f.axes for f in drawn)]
    assert [x for x, _ in labels] == [
        "λ (per unit intensity)",
        "λ (per unit intensity)",
        "false positive rate (fraction)",
        "restoration step",
    ]
    assert all("(" in y for _, y in labels)
    legend = [text.get_text() for text in drawn[2].axes[0].get_legend().get_texts()]
    assert legend[:3] == ["GMVAE(TV), K = 2", "VAE(TV)", "histogram-equalized intensity"]
    for figure in drawn:
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
        styles = {(line.get_color(), line.get_linestyle()) for line in lines}
        assert len(styles) == len(lines)


# Parts ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finished_parts_are_reused(finished, monkeypatch, capsys):
    config, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("parts/*/*")}
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trains again"))
    assert figures.main(["--config", str(config)]) == 0
    assert "0 of 12 parts are left" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("parts/*/*")}


def names_left(config):
    experiment = read_experiment(config)
    methods = [MethodParts(experiment, method) for method in experiment.methods]
    wanted = [part for parts in methods for part in parts.for_figures]
    lines = plan(wanted, experiment.out / "parts").splitlines()[:-1]
    return {line.split()[0] for line in lines if "finished" not in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"restoration": {"steps": 4, "batch_size": 3, "save_every": 2}}, set()),
        ({"figures": {"cases": 2}}, {"evaluation"}),
        ({"sweep": {"grid": [1.0]}}, {"sweep"}),
        ({"thresholds": {"max_slices": 5}}, {"calibration", "evaluation"}),
        (
            {"restoration": {"steps": 4, "batch_size": 8, "save_every": 1}},
            {"patients", "evaluation", "steps"},
        ),
        (
            {"lambda": {"grid": [0.6]}},
            {"calibration", "patients", "evaluation", "steps"},
        ),
    ],
)
def test_a_changed_setting_makes_again_only_what_depends_on_it(
    finished, caches, tmp_path, change, left
):
    config = write(tmp_path, {**settings(caches), "out": str(finished[1]), **change})
    expected = {f"{name}-{method}" for name in left for method in ("gmvae-k2", "vae")}
    assert names_left(config) == expected


@pytest.mark.slow
def test_a_further_method_leaves_the_others_as_they_are(finished, caches, tmp_path):
    values = {**settings(caches), "out": str(finished[1])}
    values["methods"] = [*values["methods"], {"method": "vae", "seed": 1, "tv_weight": 1.0}]
    parts = {"training", "calibration", "patients", "evaluation", "steps", "sweep"}
    left = names_left(write(tmp_path, values))
    assert left == {f"{name}-vae-s1" for name in parts}


@pytest.mark.slow
def test_results_of_other_settings_are_kept_without_force(finished, caches, tmp_path, capsys):
    values = {**settings(caches), "out": str(finished[1]), "figures": {"cases": 2}}
    before = (finished[1] / "table1.csv").read_bytes()
    assert tables.main(["--config", str(write(tmp_path, values))]) == 2
    assert "holds the results of other settings" in capsys.readouterr().err
    assert (finished[1] / "table1.csv").read_bytes() == before


@pytest.mark.slow
def test_a_given_run_is_not_trained_and_a_wrong_one_is_refused(finished, caches, tmp_path, capsys):
    (training,) = finished[1].glob("parts/training-vae-*")
    values = {**settings(caches), "out": str(tmp_path / "out")}
    values["methods"] = [{"method": "vae", "run": str(training / "run")}]
    assert tables.main(["--config", str(write(tmp_path, values)), "--dry-run"]) == 0
    assert "training" not in capsys.readouterr().out
    values["methods"][0] |= {"method": "gmvae"}
    assert tables.main(["--config", str(write(tmp_path, values)), "--dry-run"]) == 2
    assert "holds a vae with" in capsys.readouterr().err


def test_a_dry_run_lists_the_work_and_writes_nothing(caches, tmp_path, capsys):
    config = write(tmp_path, {**settings(caches), "out": str(tmp_path / "out")})
    assert tables.main(["--config", str(config), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "12 of 12 parts are left" in text
    work = {line.split()[0]: line.split()[2] for line in text.splitlines()[:-1]}
    assert work["training-vae"] == "24"  # 6 steps of 4 slices
    assert work["calibration-vae"] == "56"  # 4 slices at 2 lambdas and 6 slices, 4 steps
    assert work["patients-vae"] == "32"  # 8 slices, 4 steps
    assert work["sweep-vae"] == "48"  # 3 slices of 2 caches, 4 steps, 2 lambdas
    assert not (tmp_path / "out").exists()


def test_estimates_learn_from_finished_parts(tmp_path):
    part = Part(
        tmp_path, "restoring", {}, lambda folder: None, kind="restoration", slice_steps=1000
    )
    part.ensure()
    done = part.folder / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"seconds": 50.0}))
    assert measured_rates(tmp_path) == {"restoration": 0.05}
    other = Part(tmp_path, "other", {}, lambda folder: None, kind="restoration", slice_steps=12_000)
    assert "about 10.0 min" in plan([other], tmp_path)


def test_parts_are_of_their_files_content_wherever_that_lies(caches, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(caches, copied)
    np.save(copied / "counts.npy", [2, 2])
    values = {**settings(caches), "out": str(tmp_path / "out"), "methods": [{"method": "vae"}]}

    def names(folder):
        lgg = {"cache": str(folder / "lgg.h5"), "subjects": str(copied / "counts.npy")}
        patients = {**settings(folder)["patients"], "LGG": lgg}
        given = {**values, "healthy": str(folder / "healthy.h5"), "patients": patients}
        (parts,) = _all(write(tmp_path, given))
        return {path.name for part in parts.for_figures for path in part.with_needs()}

    first = names(caches)
    assert names(copied) == first
    np.save(copied / "counts.npy", [3, 1])
    assert {name.split("-")[0] for name in names(copied) - first} == {"evaluation", "sweep"}
    path = copied / "hgg.h5"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    left = names(copied) - first
    assert {name.split("-")[0] for name in left} == {"patients", "evaluation", "steps", "sweep"}


def test_a_killed_part_goes_on_in_its_folder(tmp_path):
    attempts = []

    def make(folder):
        attempts.append(sorted(path.name for path in folder.iterdir()))
        (folder / "half").touch()
        if len(attempts) == 1:
            raise KeyboardInterrupt

    part = Part(tmp_path, "killed", {}, make)
    with pytest.raises(KeyboardInterrupt):
        part.ensure()
    assert not part.done
    part.ensure()
    part.ensure()
    assert attempts == [[], ["half"]]


@pytest.mark.slow
def test_stopped_training_is_gone_on_with_bitwise(finished, caches, tmp_path, monkeypatch, capsys):
    values = {**settings(caches), "out": str(tmp_path / "out")}
    values["methods"] = values["methods"][1:]
    config = str(write(tmp_path, values))
    one_step = Trainer._one_step

    def stopped(trainer, *given):
        one_step(trainer, *given)
        if int(trainer.step) == 4:
            trainer._stop(signal.SIGTERM, None)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stopped)
        status = tables.main(["--config", config, "--tables-only"])
    assert status == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err
    assert tables.main(["--config", config, "--tables-only"]) == 0
    whole = rows_of(finished[1] / "table1.csv")[1]
    assert rows_of(tmp_path / "out" / "table1.csv")[0] == whole
    assert not list((tmp_path / "out").glob("*.png"))


# The folder -----------------------------------------------------------------------------------


def _refused(caches, out, capsys):
    """What is said of a folder where an experiment has no place; it stays as it is."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    config = write(out.parent, {**settings(caches), "out": str(out)})
    assert tables.main(["--config", str(config)]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["table1.md", "table2.csv", "fig2a.png", "fig6.pdf"])
def test_a_table_or_figure_of_somebody_else_is_kept_without_force(caches, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert f"{out / name} exists; choose another name or pass --force" in _refused(
        caches, out, capsys
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 1}'])
def test_a_folder_of_something_else_is_refused(caches, tmp_path, capsys, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "experiment.json").write_text(content)
    said = _refused(caches, out, capsys)
    assert str(out) in said
    assert "choose another --out, or pass --force" in said


def test_a_damaged_part_is_named(caches, tmp_path, capsys):
    part = tmp_path / "out" / "parts" / "training-vae-0123456789"
    part.mkdir(parents=True)
    for content in ("", "{", "[]", '{"slice_steps": 3}'):
        (part / "done.json").write_text(content)
        assert tables.main(_dry_run(caches, tmp_path)) == 2
        assert f"remove {part}, which is then made again" in capsys.readouterr().err


def test_two_processes_do_not_make_one_experiment(caches, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        assert f"{out} is in use by another process" in _refused(caches, out, capsys)
        assert tables.main(_dry_run(caches, tmp_path)) == 0


def _dry_run(caches, folder):
    config = write(folder, {**settings(caches), "out": str(folder / "out")})
    return ["--config", str(config), "--dry-run"]


# Configuration --------------------------------------------------------------------------------


def test_the_example_configurations_are_complete():
    methods = {
        "experiment.yaml": set(paper.TABLE_1),
        "experiment_table1.yaml": set(paper.TABLE_1),
        "experiment_demo.yaml": {"gmvae", "vae"},
    }
    for name, expected in methods.items():
        experiment = read_experiment(EXAMPLES / name)
        assert {method.method for method in experiment.methods} == expected
        for method in experiment.methods:
            config = experiment.training_config(method, (158, 198))
            assert config.network.num_clusters == (method.clusters or config.network.num_clusters)
    assert read_experiment(EXAMPLES / "experiment.yaml").choice.grid == tuple(
        np.round(np.arange(20) * 0.2, 10)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"healty": "x"}, "unknown healty; the keys are figures, groups, healthy, lambda"),
        ({"methods": []}, "expected a list of methods"),
        ({"methods": [{"method": "gan"}]}, "cannot use method 'gan'"),
        ({"methods": [{"clusters": 3}]}, "methods: missing method"),
        ({"methods": [{"method": "vae"}] * 2}, "not all different"),
        ({"methods": [{"method": "vae", "clusters": 3}]}, "clusters of vae"),
        ({"methods": [{"method": "gmvae", "clusters": 0}]}, "num_clusters of 1 or more"),
        ({"patients": "lgg.h5"}, "a name and a cache for each group"),
        ({"patients": {"LGG": {"cach": "a"}}}, "patients: LGG: unknown cach and missing cache"),
        ({"preset": "fast"}, "cannot use preset 'fast'"),
        ({"training": {"step": 3}}, "Unknown setting of training or network.*step"),
        ({"training": {"steps": 0}}, "steps of 1 or more"),
        ({"methods": [{"method": "anogan", "training": {"steps": 0}}]}, "steps of 1 or more"),
        ({"methods": [{"method": "aae-128", "tv_weight": 1}]}, "tv_weight of aae-128"),
        ({"lambda": {"grid": "1:2"}}, "Expected a grid"),
        ({"lambda": {"grids": [1]}}, "lambda: unknown grids"),
        ({"restoration": {"batch_size": 0}}, "batch_size: expected a whole number above 0"),
        ({"restoration": {"precision": "half"}}, "cannot use restoration: precision"),
        ({"figures": {"method": "gmvae"}}, "figures: method, one of"),
        ({"sweep": {}}, "sweep: missing grid"),
        ({"healthy": None}, "healthy: missing cache"),
    ],
)
def test_a_wrong_configuration_is_refused(caches, tmp_path, change, message):
    path = write(tmp_path, {**settings(caches), "out": str(tmp_path / "out"), **change})
    with pytest.raises((InputError, FileNotFoundError), match=message):
        _all(path)


def _all(path):
    experiment = read_experiment(path)
    return [MethodParts(experiment, method) for method in experiment.methods]


@pytest.mark.parametrize("content", ["- a", "a: [", "text"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, capsys):
    path = tmp_path / "other.yaml"
    path.write_text(content)
    assert tables.main(["--config", str(path)]) == 2
    assert "other.yaml" in capsys.readouterr().err


def test_caches_of_different_sizes_are_refused(caches, tmp_path, capsys):
    write_cache(tmp_path / "large.h5", train=0, shape=(42, 42))
    values = {**settings(caches), "patients": {"LGG": str(tmp_path / "large.h5")}}
    assert tables.main(["--config", str(write(tmp_path, values)), "--dry-run"]) == 2
    assert "the same --voxel-size" in capsys.readouterr().err
