"""What the viewer of a report shows: volumes as base64 NIfTI, in the axes of the scan's own grid.

Grays are uint8, maps int16 with a slope, masks the numbers of their lesions. The volumes are cut
to the brain and a margin, and resampled only beyond `VIEWER_VOXELS` or `VIEWER_BYTES`.
"""

import base64
import gzip
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from scipy import ndimage

from tf_lesion.evaluation.plots import WINDOW_PERCENTILE
from tf_lesion.evaluation.results import CENTER, Result

MARGIN_MM = 20.0  # around the brain, so that the skull is seen
VIEWER_VOXELS = 8e6  # a head at 1 mm has 6 million around the brain; more is resampled
VIEWER_BYTES = 12e6  # of all volumes as base64; with NiiVue and the pictures a page has 15 MB
SMALLER = 0.8  # share of the voxels that is tried next
HEADROOM = 1.5  # the gray values go on beyond the window, which can be changed
MAP_STEPS, MAP_BITS = 32767, 9  # int16 up to the largest value, of which 9 bits are kept
SHOWN_PERCENTILE = 99.0  # of a map in the brain; what is above is colored, without a threshold
FULL_PERCENTILE = 99.9  # has the last color
MOST_NUMBERS = 255  # of lesions; all beyond share the last
GRAYS = {"scan": "scan", "normalized": "normalized scan", "restored": "restored"}
MAPS = {
    "score": "the residual after post-processing",
    "residual": "|observed − restored|",
    "uncertainty": "standard deviation over the restorations",
}
INTENSITY = "normalized intensity"


@dataclass(frozen=True)
class Grid:
    """A part of the scan's grid, coarser by a factor along each axis.

    Attributes:
        window: three slices.
        factors: [3], 1 or more.
        affine: [4, 4], voxel -> mm of the scan.
    """

    window: tuple[slice, slice, slice]
    factors: np.ndarray
    affine: np.ndarray

    @property
    def coarser(self) -> bool:
        """Whether voxels are larger than those of the scan."""
        return bool((self.factors > 1).any())

    @property
    def voxel_mm(self) -> list[float]:
        """[3] mm."""
        return voxel_sizes(self.affine).tolist()

    def sample(self, volume: np.ndarray, *, order: int = 1) -> np.ndarray:
        """A volume of the scan on this grid; `order` 0 takes the nearest voxel."""
        part = volume[self.window]
        if not self.coarser:
            return part
        shape = np.maximum(np.array(part.shape) // self.factors, 1).astype(int)
        return ndimage.affine_transform(
            part, self.factors, (self.factors - 1) / 2, tuple(shape), order=order, mode="nearest"
        )


def grid_of(result: Result, *, most_voxels: float) -> Grid:
    """The `Grid` of the brain and `MARGIN_MM`, with at most about so many voxels."""
    sizes, window = result.scan.voxel_sizes, []
    found = ndimage.find_objects(result.brain.astype(np.uint8))[0]
    for part, size, length in zip(found, sizes, result.brain.shape, strict=True):
        margin = round(MARGIN_MM / size)
        window.append(slice(max(part.start - margin, 0), min(part.stop + margin, length)))
    lengths = np.array([part.stop - part.start for part in window])
    finest, factors = sizes.min(), np.ones(3)
    while np.prod(lengths // factors) > most_voxels:
        finest *= 1.02
        factors = np.maximum(finest / sizes, 1)
    first = np.array([part.start for part in window]) + (factors - 1) / 2
    own = result.scan.affine
    affine = from_matvec(own[:3, :3] * factors, own[:3, :3] @ first + own[:3, 3])
    return Grid(tuple(window), factors, affine)


def viewer(result: Result, *, start: list[float] | None = None) -> dict[str, Any]:
    """Layers of the viewer, and what its controls need to know.

    Args:
        result: the scan and its maps.
        start: [x, y, z] in mm of the scan, where to look first; by default the brain's middle.

    Returns:
        `layers`: a list of dicts with `name`, `kind` (gray, map, mask), `label`, `unit`, `nifti`
        (base64); `from` and `to` of grays and maps, the values with the first and last color;
        `count`, the number of lesions of a mask whose voxels hold their numbers, else 0.
        `points`: {threshold's name: {label, threshold}}; `made_from`: of the `Result`;
        `voxel_mm`, `coarser`: of the `Grid`; `start`.
    """
    most = VIEWER_VOXELS
    while True:
        grid = grid_of(result, most_voxels=most)
        layers = [*_grays(result, grid), *_maps(result, grid), *_masks(result, grid)]
        if sum(len(layer["nifti"]) for layer in layers) <= VIEWER_BYTES:
            break
        voxels = np.prod([part.stop - part.start for part in grid.window])
        most = SMALLER * min(most, float(voxels))
    return {
        "layers": layers,
        "points": {
            name: {"label": rate_label(at["target_fpr"]), "threshold": at["threshold"]}
            for name, at in result.facts["lesions"].items()
        },
        "made_from": result.made_from,
        "voxel_mm": grid.voxel_mm,
        "coarser": grid.coarser,
        "start": start or _middle(result),
    }


def rate_label(rate: float) -> str:
    """0.05 -> "5 %"."""
    return f"{100 * rate:g} %"


def lesion_places(result: Result, point: str, rows: list[dict[str, Any]]) -> list[list[float]]:
    """A place to look at in each lesion, mm of the scan: its voxel nearest to the center."""
    numbers = result.numbers_at(point)
    voxels = np.argwhere(result.mask_at(point) if numbers is None else numbers)
    belongs = None if numbers is None else numbers[tuple(voxels.T)]
    places = voxels @ result.scan.affine[:3, :3].T + result.scan.affine[:3, 3]
    found = []
    for row in rows:
        own = places if belongs is None else places[belongs == row["lesion"]]
        center = np.array([row[name] for name in CENTER])
        nearest = own[np.linalg.norm(own - center, axis=1).argmin()] if len(own) else center
        found.append([round(mm, 2) for mm in nearest.tolist()])
    return found


def shown_from(result: Result, name: str, values: np.ndarray) -> float:
    """Least value of a map that is colored at first: the threshold, or that of the top percent."""
    if result.point and name == result.made_from:
        return result.facts["lesions"][result.point]["threshold"]
    return float(np.percentile(values, SHOWN_PERCENTILE))


def _grays(result, grid):
    for name, label in GRAYS.items():
        if name != "scan" and not result.has(name):
            continue
        volume = result.scan.data if name == "scan" else result.volume(name)
        top = max(float(np.percentile(volume[result.brain], WINDOW_PERCENTILE)), 1e-6)
        slope = HEADROOM * top / 255
        gray = np.rint(np.clip(grid.sample(volume) / slope, 0, 255)).astype(np.uint8)
        nifti = _nifti(gray, grid.affine, slope=slope)
        yield _layer(name, "gray", label, nifti=nifti, **{"from": 0.0, "to": top})


def _maps(result, grid):
    for name in MAPS:
        if not result.has(name):
            continue
        volume = result.volume(name)
        inside = volume[result.brain]
        low = shown_from(result, name, inside)
        high = max(float(np.percentile(inside, FULL_PERCENTILE)), 1.5 * low, 1e-6)
        slope = max(float(volume.max()), 1e-6) / MAP_STEPS
        nifti = _nifti(_kept_bits(grid.sample(volume) / slope), grid.affine, slope=slope)
        unit = result.unit if name == result.made_from and result.unit else INTENSITY
        yield _layer(name, "map", name, unit=unit, nifti=nifti, **{"from": low, "to": high})


def _masks(result, grid):
    for point, at in result.facts["lesions"].items():
        numbers = result.numbers_at(point)
        volume, count = result.mask_at(point), 0
        if numbers is not None:
            volume, count = np.minimum(numbers, MOST_NUMBERS), int(numbers.max())
        yield _mask(point, rate_label(at["target_fpr"]), volume, grid, count=count)
    if result.truth is not None:
        yield _mask("truth", "truth", result.truth, grid)
    yield _mask("brain", "brain", result.brain, grid)


def _mask(name, label, volume, grid, *, count=0):
    nifti = _nifti(grid.sample(volume.astype(np.uint8), order=0), grid.affine)
    return _layer(name, "mask", label, nifti=nifti, count=count)


def _layer(name, kind, label, *, unit="", count=0, **more):
    return {"name": name, "kind": kind, "label": label, "unit": unit, "count": count, **more}


def _kept_bits(steps):
    """Int16 of values from 0 to `MAP_STEPS`, rounded to `MAP_BITS` bits, which pack better."""
    steps = np.rint(np.maximum(steps, 0))
    unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(steps, 1))) + 1 - MAP_BITS, 0)
    return np.minimum(np.rint(steps / unit) * unit, MAP_STEPS).astype(np.int16)


def _nifti(values, affine, *, slope=1.0):
    image = nib.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, 0)
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()


def _middle(result):
    center = ndimage.center_of_mass(result.brain)
    return [round(mm, 2) for mm in (result.scan.affine @ [*center, 1.0])[:3].tolist()]
