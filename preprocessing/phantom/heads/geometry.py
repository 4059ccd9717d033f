"""Pose, shape and field of view of a painted head."""

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.phantom.fields import lattice_size, upsample

LARGEST_DEGREES, USUAL_DEGREES = 45.0, 12.0
ANY_POSE = 0.55  # share of heads turned by anything up to LARGEST_DEGREES; others, as usual
SCALE, AXIS_SCALE, SHEAR = 0.07, 0.04, 0.03  # standard deviations of logarithms; of shears
BEND_MM, BEND_STEP_MM = (0.0, 3.5), 40.0  # standard deviation, distance of control points
LARGEST_FIELD_MM = 240.0
MARGIN_MM, TIGHT_MARGIN_MM = (2.0, 55.0), (0.0, 25.0)  # of the field of view around the brain
CUT, SLAB = 0.27, 0.08  # shares of heads that lose a part of the brain
CUT_SHARE, SLAB_MM = (0.03, 0.4), (18.0, 80.0)
INVERSE_STEPS = 12


@dataclass(frozen=True)
class Geometry:
    """Maps from mm of the scan to mm of the head, and to MNI space.

    Attributes:
        fine_affine: [4, 4], voxel painted -> mm of the scan; no rotation.
        shape: of the voxels painted.
        head_from_scan: [4, 4], mm, without the bend.
        bend: [3, X, Y, Z] float32 mm, added to places in the head, on the voxels painted.
        mni_from_head: [4, 4], of the anatomy.
        facts: what was drawn.
    """

    fine_affine: np.ndarray
    shape: tuple
    head_from_scan: np.ndarray
    bend: np.ndarray = field(repr=False)
    mni_from_head: np.ndarray
    facts: dict

    def head_points(self, step=1, offset=0.0):
        """[3, x, y, z] float32 mm in the head, of every `step`-th voxel painted from `offset`."""
        matrix = self.head_from_scan @ self.fine_affine
        axes = [(np.arange(0, n, step) + offset).astype(np.float32) for n in self.shape]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        points = [
            np.float32(m[0]) * x + np.float32(m[1]) * y + np.float32(m[2]) * z + np.float32(m[3])
            for m in matrix[:3]
        ]
        return np.stack(points) + self.bend[:, ::step, ::step, ::step]

    def head_voxels(self, affine):
        """[3, X, Y, Z], voxels of a volume of the head (no rotation) where the painted ones lie."""
        points = self.head_points()
        scale = np.diag(affine)[:3].astype(np.float32)
        return (points - affine[:3, 3].astype(np.float32)[:, None, None, None]) / scale[
            :, None, None, None
        ]

    def mni(self, points):
        """Places [N, 3] in the scan, mm -> in MNI space, mm."""
        head = (
            points @ self.head_from_scan[:3, :3].T + self.head_from_scan[:3, 3] + self._bend(points)
        )
        return head @ self.mni_from_head[:3, :3].T + self.mni_from_head[:3, 3]

    def to_scan(self, points):
        """Places [N, 3] in the head -> in the scan, mm."""
        back = np.linalg.inv(self.head_from_scan)
        found = points @ back[:3, :3].T + back[:3, 3]
        for _ in range(INVERSE_STEPS):
            straight = points - self._bend(found)
            found = straight @ back[:3, :3].T + back[:3, 3]
        return found

    def _bend(self, points):
        voxels = (points - self.fine_affine[:3, 3]) / np.diag(self.fine_affine)[:3]
        return np.stack(
            [ndimage.map_coordinates(b, voxels.T, order=1, mode="nearest") for b in self.bend],
            axis=1,
        )


def draw_geometry(rng, anatomy, fine_mm, *, tight):
    """A `Geometry`; `tight` for stripped heads, whose field of view may end at the brain."""
    any_pose = rng.random() < ANY_POSE
    degrees = rng.uniform(0, LARGEST_DEGREES) if any_pose else abs(rng.normal(0, USUAL_DEGREES))
    degrees = min(degrees, LARGEST_DEGREES)
    axis = rng.standard_normal(3)
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    scale = np.exp(SCALE * rng.standard_normal() + AXIS_SCALE * rng.standard_normal(3))
    shear = np.eye(3) + np.triu(SHEAR * rng.standard_normal((3, 3)), 1)
    matrix = np.eye(4)
    matrix[:3, :3] = shear @ np.diag(scale) @ turn
    low, high, cut = _field_of_view(rng, anatomy, matrix, tight)
    shape = tuple(int(n) for n in np.maximum(np.round((high - low) / fine_mm), 6))
    fine = np.diag([fine_mm] * 3 + [1.0])
    fine[:3, 3] = low + fine_mm / 2
    step = BEND_STEP_MM / fine_mm
    lattice = rng.standard_normal((3, *[lattice_size(n, step) for n in shape])) * rng.uniform(
        *BEND_MM
    )
    bend = np.stack([upsample(values, shape, step) for values in lattice])
    facts = {
        "degrees": round(float(degrees), 1),
        "scale": np.round(scale, 3).tolist(),
        "cut": cut,
        "field_mm": np.round(high - low).tolist(),
    }
    return Geometry(fine, shape, matrix, bend, anatomy.mni_from_head, facts)


def _field_of_view(rng, anatomy, head_from_scan, tight):
    """(low [3], high [3], what was cut): a box in mm of the scan."""
    places = np.argwhere(anatomy.outside[::3, ::3, ::3] < 0) * 3
    places = places @ anatomy.outside_affine[:3, :3].T + anatomy.outside_affine[:3, 3]
    places = (places - head_from_scan[:3, 3]) @ np.linalg.inv(head_from_scan[:3, :3]).T
    brain_low, brain_high = places.min(axis=0) - 3, places.max(axis=0) + 3
    margins = rng.uniform(*(TIGHT_MARGIN_MM if tight else MARGIN_MM), (2, 3))
    low, high = brain_low - margins[0], brain_high + margins[1]
    excess = np.maximum(high - low - LARGEST_FIELD_MM, 0)
    room = np.maximum(margins.sum(axis=0), 1e-6)
    low += excess * margins[0] / room
    high -= excess * margins[1] / room
    kind = rng.choice(["", "cut", "slab"], p=[1 - CUT - SLAB, CUT, SLAB])
    axis = rng.choice(3, p=[0.2, 0.2, 0.6])
    if kind == "cut":
        for _ in range(rng.integers(1, 3)):
            lost = rng.uniform(*CUT_SHARE) * (brain_high - brain_low)[axis]
            if rng.random() < 0.5:
                low[axis] = brain_low[axis] + lost
            else:
                high[axis] = brain_high[axis] - lost
            axis = rng.choice(3)
    elif kind == "slab":
        thick = rng.uniform(*SLAB_MM)
        extent = (brain_high - brain_low)[axis]
        first = brain_low[axis] + rng.uniform(0.1, 0.9) * extent - thick / 2
        low[axis], high[axis] = first, first + thick
    return low, high, str(kind)
