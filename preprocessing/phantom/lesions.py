"""What strokes and multiple sclerosis share: where lesions are drawn, and regions of a volume.

The modules `tumors`, `strokes` and `sclerosis` have one interface: `draw` makes a patient's
lesions, `grow` paints one of them, `LABELS` names its labels, `summary` tells what it is.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocessing.phantom.fields import Grid, random_field

# Roughness of the outline and its scale, in radii.
LOBES, LOBE_SCALE = 0.22, 0.7
KNOBS, KNOB_SCALE = 0.1, 0.25
SMOOTH_MM = 8.0  # smaller lesions have the roughness of one of this radius
BOX_RADII, BOX_MM = 1.9, 4.0  # beyond both together no outline reaches
MM3_PER_ML = 1000.0
Maps = Callable[[str], np.ndarray]  # name of a field of `CoarseMaps` -> it on the grid of the scan


@dataclass(frozen=True)
class Places:
    """Cerebral tissue of a scan, by n places. Lengths in mm; directions have length 1."""

    points: np.ndarray  # [n, 3], in the space of the scan
    depth: np.ndarray  # [n] below the surface of the brain
    white: np.ndarray  # [n] share of white matter
    to_ventricle: np.ndarray  # [n] distance from the ventricles
    inward: np.ndarray  # [n, 3] away from the surface
    away: np.ndarray  # [n, 3] away from the ventricles


class Drawn:
    """Drawn parameters, a dataclass."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for phantom.json."""
        return {
            name: value if isinstance(value, str | bool) else np.round(value, 3).tolist()
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Lesion(Drawn):
    """One lesion of a stroke or of multiple sclerosis. Lengths in mm, intensities as in `Tumor`."""

    site: str
    center: tuple[float, float, float]  # in the space of the scan
    axis: tuple[float, float, float]  # direction of the axis it is long and tapers along, length 1
    volume_ml: float
    elongation: float  # half axis along `axis`, relative to those across
    taper: float  # how much narrower it becomes along the axis: exp(-taper) per radius
    level: float
    edge: float  # width
    contrast: float  # share of the contrast of the tissue that is left inside
    push: float  # largest shift of the tissue around

    @property
    def radius(self) -> float:
        """Of the ball of the same volume."""
        return float(np.cbrt(3 * self.volume_ml * MM3_PER_ML / (4 * np.pi)))


class Region(NamedTuple):
    """Where a lesion is in its box."""

    inside: np.ndarray  # [x, y, z] bool
    depth: np.ndarray  # [x, y, z] mm inside its outline


def box_of(lesion: Lesion, grid: Grid) -> tuple[slice, ...]:
    """Slices around a lesion."""
    reach = BOX_RADII * lesion.radius * max(lesion.elongation, 1) + BOX_MM
    low, high = (np.add(lesion.center, side * reach) for side in (-1, 1))
    low, high = ((end - grid.origin) / grid.voxel_size for end in (low, high))
    ends = zip(low, high, grid.shape, strict=True)
    return tuple(slice(max(int(a), 0), min(int(b) + 2, n)) for a, b, n in ends)


def region(
    rng: np.random.Generator,
    lesion: Lesion,
    *,
    room: np.ndarray,
    barrier: np.ndarray,
    box: tuple[slice, ...],
    grid: Grid,
) -> Region:
    """The voxels nearest to a lesion's center, as many as its volume takes: at least one.

    Args:
        room: [x, y, z] bool, voxels of the box it may take.
        barrier: [x, y, z] mm by which a voxel counts as farther away than it is.
        box: `box_of(lesion, grid)`.
    """
    cost = lesion.radius * (_distance(lesion, box, grid) + _outline(rng, lesion, room.shape, grid))
    cost += barrier
    count = round(lesion.volume_ml * MM3_PER_ML / grid.voxel_size**3)
    costs = np.sort(cost[room])
    if not costs.size:
        return Region(room, np.full(room.shape, -np.inf, np.float32))
    limit = costs[np.clip(count, 1, costs.size) - 1]
    return Region(room & (cost <= limit), limit - cost)


def rough(rng: np.random.Generator, shape: tuple[int, ...], radius: float) -> np.ndarray:
    """Outline of lobes and knobs, in radii; `radius` in voxels."""
    lobes = random_field(rng, shape, LOBE_SCALE * radius)
    return LOBES * lobes + KNOBS * random_field(rng, shape, KNOB_SCALE * radius)


def share_of(lesion: Lesion, depth: np.ndarray) -> np.ndarray:
    """How much of each voxel is lesion, by depth inside the outline: half of it there."""
    return np.clip(0.5 + depth / lesion.edge, 0, 1)


def _outline(rng, lesion, shape, grid):
    return rough(rng, shape, max(lesion.radius, SMOOTH_MM) / grid.voxel_size)


def _distance(lesion, box, grid):
    """Distance [x, y, z] from the center in radii, of an ellipsoid that tapers along its axis."""
    offsets = [
        (np.arange(part.start, part.stop) * grid.voxel_size + origin - center) / lesion.radius
        for part, origin, center in zip(box, grid.origin, lesion.center, strict=True)
    ]
    offsets = np.ix_(*offsets)
    along = sum(a * offset for a, offset in zip(lesion.axis, offsets, strict=True))
    across = sum(offset**2 for offset in offsets) - along**2
    across = np.maximum(across, 0) * np.exp(2 * lesion.taper * np.clip(along, -1.5, 1.5))
    stretch = lesion.elongation ** (2 / 3)  # the square of those across is its inverse
    return np.sqrt((along / stretch) ** 2 + across * stretch).astype(np.float32)
