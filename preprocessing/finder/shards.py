"""Painted heads as examples for the network of the brain finder, kept in shards on disk."""

from pathlib import Path

import numpy as np

from preprocessing.phantom.heads.acquisition import resample_bands
from preprocessing.phantom.heads.anatomy import load_heads
from preprocessing.phantom.heads.paint import paint_head
from tf_lesion.scans.finder import canonical
from tf_lesion.scans.finder.grid import FINE_MM, coarse_places, network_input
from tf_lesion.scans.finder.pose import fit_similarity

SIDE = 80  # voxels of 3 mm
INTENSITY_STEPS, OUTSIDE_STEPS = 160, 4  # of the whole numbers kept: per unit, per mm
SHARD = 100  # heads
NAMES = ("volume", "outside", "coordinates", "inside", "mni_from_grid", "landmarks")


def make_example(anatomies, seed, number):
    """One head as a dictionary of arrays; mm are from the middle of the grid.

    volume [80, 80, 80] uint8; outside [80, 80, 80] int8; coordinates [20, 20, 20, 3] float16, mm
    in MNI space; inside [3, 2]; mni_from_grid [4, 4], similarity, by the landmarks; landmarks
    [20, 3] mm.
    """
    head = paint_head(anatomies, seed, number, fine_mm=FINE_MM)
    volume, affine, inside = network_input(head.image, head.affine, shape=(SIDE,) * 3)
    outside = resample_bands(head.outside, head.outside_affine, affine, volume.shape)
    middle = affine[:3, :3] @ np.full(3, (SIDE - 1) / 2) + affine[:3, 3]
    places = coarse_places((SIDE,) * 3)
    coordinates = head.geometry.mni(places.reshape(-1, 3) + middle).reshape(places.shape)
    landmarks = head.landmarks - middle
    limit = np.iinfo(np.int8).max
    return {
        "volume": np.rint(volume * INTENSITY_STEPS).astype(np.uint8),
        "outside": np.clip(np.rint(outside * OUTSIDE_STEPS), -limit, limit).astype(np.int8),
        "coordinates": coordinates.astype(np.float16),
        "inside": np.array(inside, np.int16),
        "mni_from_grid": fit_similarity(landmarks, canonical.landmarks()).astype(np.float32),
        "landmarks": landmarks.astype(np.float32),
    }


def write_shard(folder: str | Path, paths: list[Path], seed: int, shard: int) -> None:
    """Heads `SHARD * shard` and following, of label maps, in `folder`; a shard there is kept."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"{shard:04d}.done"
    if done.exists():
        return
    anatomies = load_heads(tuple(paths))
    examples = [
        make_example(anatomies, seed, number)
        for number in range(SHARD * shard, SHARD * (shard + 1))
    ]
    for name in NAMES:
        np.save(folder / f"{shard:04d}_{name}.npy", np.stack([e[name] for e in examples]))
    done.touch()


class Shards:
    """The examples in a folder, mapped into memory; more may come while it is read."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.shards = []
        self.refresh()

    def refresh(self):
        """Look for new shards."""
        for done in sorted(self.folder.glob("*.done"))[len(self.shards) :]:
            self.shards.append(
                {n: np.load(self.folder / f"{done.stem}_{n}.npy", mmap_mode="r") for n in NAMES}
            )

    def __len__(self):
        return SHARD * len(self.shards)

    def __getitem__(self, number):
        shard = self.shards[number // SHARD]
        return {name: np.asarray(shard[name][number % SHARD]) for name in NAMES}
