"""What the tests share: small configurations, small caches, and the released graph's numbers."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The commands that tests start must round as this process does, whatever a test module imports.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"

import keras
import numpy as np
import pytest
from matplotlib.figure import Figure

from tf_lesion.caches.slices import CacheWriter
from tf_lesion.evaluation.metrics import ThresholdCounter
from tf_lesion.presets import preset

GOLDEN = Path(__file__).parent / "golden"
HEIGHT, WIDTH = 38, 42  # the smallest comfortable slices


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    """Keras draws initial weights from a global stream: without this, a test is a lottery."""
    keras.utils.set_random_seed(0)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved in a test, to look at."""
    figures, save = [], Figure.savefig

    def kept(figure, *args, **options):
        figures.extend([] if figure in figures else [figure])
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def golden(name):
    """Arrays of a file in tests/golden, by the released code's keys."""
    with np.load(GOLDEN / name) as stored:
        return dict(stored)


def count_at(scores, lesion, thresholds):
    """Counts [4, T] of one subject; see `ThresholdCounter`."""
    return ThresholdCounter(thresholds).count(scores, lesion)


def small_config(model="gmvae", name="paper", **sections):
    """A preset at 38 x 42 pixels with 8 filters; sections replace single fields."""
    config = preset(name, model)
    small = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_filters": 8,
        "square": 32,
        "initializer": "he_normal",
    }
    config = config.replace(network={**small, **sections.pop("network", {})})
    return config.replace(**sections)


def phantom_slices(count, *, seed=0, shape=(HEIGHT, WIDTH)):
    """Ellipses with a bright center and smooth shades, [count, H, W] in [0, 1], 0 outside."""
    rng = np.random.default_rng(seed)
    height, width = shape
    x, y = np.mgrid[:height, :width]
    images = []
    for _ in range(count):
        size_x, size_y = rng.uniform(0.36, 0.44, 2) * shape
        radius = ((x - height / 2) / size_x) ** 2 + ((y - width / 2) / size_y) ** 2
        wave = np.sin(x / rng.uniform(4, 8) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(4, 8))
        image = 0.4 + 0.08 * wave + 0.3 * np.exp(-8 * radius)
        images.append(np.where(radius < 1, image, 0))
    return np.array(images, dtype=np.float32)


def write_cache(path, *, train=24, test=7, shape=(HEIGHT, WIDTH), crop=None, seed=0):
    """A healthy cache, which is a patients' cache too: `Test` has `Mask` and `Label`."""
    crop = crop or (0, shape[0], 0, shape[1])
    with CacheWriter(path, slice_shape=shape, crop=crop, settings={"made": "by a test"}) as cache:
        if train:
            images = phantom_slices(train, seed=seed, shape=shape)
            cache.append("Train", images, subject_id="train", slice_index=range(train))
        for number, count in enumerate((test - test // 2, test // 2)):
            images = phantom_slices(count, seed=seed + 1 + number, shape=shape)
            label = np.zeros_like(images, dtype=np.uint8)
            label[:, shape[0] // 2 - 4 : shape[0] // 2, shape[1] // 2 + 4 : shape[1] // 2 + 9] = 1
            images = np.where(label, np.minimum(images + 0.4, 1), images)
            cache.append(
                "Test",
                images,
                subject_id=f"test-{number}",
                slice_index=range(count),
                mask=images > 0,
                label=label,
            )
        cache.set_reference(np.linspace(0.2, 0.8, 1001))
    return path


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory):
    """A small cache, made once."""
    return write_cache(tmp_path_factory.mktemp("cache") / "healthy.h5")


def make_run(
    folder, cache, model="gmvae", name="paper", *, steps=12, restoration_steps=6, network=None
):
    """A run of a few training steps on a cache, that restores in a few steps."""
    from tf_lesion.caches.slices import SliceCache
    from tf_lesion.training.runs import Run
    from tf_lesion.training.trainer import Trainer

    config = small_config(
        model,
        name,
        network=network or {},
        training={"steps": steps, "batch_size": 4, "learning_rate": 1e-3, "picture_every": steps},
        restoration={"steps": restoration_steps},
    )
    run = Run(Path(folder))
    with SliceCache(cache, "Train") as train, SliceCache(cache, "Test") as test:
        run.write(config, train)
        Trainer(run, config, train=train, test=test).fit()
    return run.folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A process that runs commands in children, which may be killed or get into trouble."""
    from other_process import Server

    made = Server(tmp_path_factory.mktemp("server") / "log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, server):
    """{name: a small command of each kind, with its inputs}."""
    from other_process import make_jobs

    return make_jobs(tmp_path_factory.mktemp("inputs"), server)
