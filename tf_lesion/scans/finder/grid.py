"""The grids of the brain finder: any scan as a cube of 3 mm voxels along its own axes."""

import numpy as np

FINE_MM = 3.0  # voxels that the finder reads
CUBE = 16  # voxels: axes are padded to whole multiples, because the network halves them
DARK_PERCENTILE, BRIGHT_PERCENTILE = 1.0, 99.5  # become 0 and 1
BRIGHTEST = 1.5
COARSE = 4  # of those in one of the coordinates
MOST_SAMPLES = 1_000_000  # voxels that percentiles are taken of
LEAST_INSIDE = 0.02  # share of a plane that is in the scan, to keep it


def network_input(
    data: np.ndarray, affine: np.ndarray, *, shape: tuple[int, int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple]:
    """A scan as the network sees it.

    Args:
        data: [X, Y, Z] float, nearest to RAS.
        affine: [4, 4], voxel -> mm.
        shape: of the result; by default as large as the scan needs, multiples of CUBE.

    Returns:
        (volume, grid_affine, inside): [A, B, C] float32, 0 to BRIGHTEST, 0 outside of the scan,
        which lies in the middle; [4, 4], voxel of it -> mm; three (first, last + 1) of the voxels
        whose centers are in the scan.
    """
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    lengths = sizes * data.shape
    if shape is None:
        shape = tuple(int(np.ceil(length / FINE_MM / CUBE)) * CUBE for length in lengths)
    volume = robust_scale(data)
    to_voxel = np.eye(4)  # voxel of the grid -> voxel of the scan
    inside = []
    for axis, (length, size, count) in enumerate(zip(lengths, sizes, shape, strict=True)):
        step = FINE_MM / size
        start = (data.shape[axis] - 1) / 2 - step * (count - 1) / 2
        to_voxel[axis, axis], to_voxel[axis, 3] = step, start
        volume = _along(volume, axis, axis_weights(data.shape[axis], start, step, count))
        half = length / FINE_MM / 2
        inside.append(
            (max(0, round(count / 2 - half)), min(count, max(round(count / 2 + half), 1)))
        )
    return np.clip(volume, 0, BRIGHTEST), affine @ to_voxel, tuple(inside)


def robust_scale(data: np.ndarray) -> np.ndarray:
    """Linear scale of intensities, [X, Y, Z] float32: two percentiles become 0 and 1."""
    stride = max(1, int(np.ceil((data.size / MOST_SAMPLES) ** (1 / 3))))
    dark, bright = np.percentile(
        data[::stride, ::stride, ::stride], (DARK_PERCENTILE, BRIGHT_PERCENTILE)
    )
    if bright <= dark:
        bright = float(data.max())
    spread = bright - dark if bright > dark else 1.0
    return ((data - np.float32(dark)) / np.float32(spread)).astype(np.float32)


def axis_weights(length: int, start: float, step: float, count: int) -> np.ndarray:
    """[count, length] float32: interpolation of one axis at `start + step * i`, in voxels.

    Linear where the new voxels are the smaller; a triangle as wide as two new voxels where they
    are the larger, so that nothing between them is lost. Places beyond the ends count as 0.
    """
    width = max(step, 1.0)
    place = start + step * np.arange(count)[:, None]
    weights = np.maximum(0, 1 - np.abs(place - np.arange(length)) / width)
    return (weights / width).astype(np.float32)


def _along(volume, axis, weights):
    return np.moveaxis(np.tensordot(weights, volume, axes=(1, axis)), 0, axis)


def to_channels(volume: np.ndarray) -> np.ndarray:
    """[2a, 2b, 2c] -> [a, b, c, 8]: the voxels of each cube of two, as channels."""
    a, b, c = (n // 2 for n in volume.shape)
    cubes = volume.reshape(a, 2, b, 2, c, 2).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cubes.reshape(a, b, c, 8))


def from_channels(channels: np.ndarray) -> np.ndarray:
    """The inverse of `to_channels`."""
    a, b, c, _ = channels.shape
    cubes = channels.reshape(a, b, c, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return cubes.reshape(2 * a, 2 * b, 2 * c)


def halved(volume: np.ndarray) -> np.ndarray:
    """[2a, 2b, 2c] -> [a, b, c]: mean over cubes of two voxels."""
    a, b, c = (n // 2 for n in volume.shape)
    return volume.reshape(a, 2, b, 2, c, 2).mean(axis=(1, 3, 5), dtype=np.float32)


def grid_mm(count: int, size_mm: float) -> np.ndarray:
    """[count] mm from the middle of an axis."""
    return (np.arange(count) - (count - 1) / 2) * size_mm


def coarse_places(shape: tuple[int, int, int]) -> np.ndarray:
    """[a, b, c, 3] mm from the middle of a grid: the middles of cubes of COARSE voxels."""
    axes = [grid_mm(n // COARSE, FINE_MM * COARSE) for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def finder_input(volume: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """What the network reads, [a, b, c, 12] at 6 mm, of volumes [2a, 2b, 2c] at 3 mm."""
    axes = [grid_mm(n // 2, 2 * FINE_MM) / 100 for n in volume.shape]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    parts = (to_channels(volume), halved(inside)[..., None], places)
    return np.concatenate(parts, axis=-1).astype(np.float32)


def covering_box(inside: np.ndarray) -> tuple[slice, slice, slice]:
    """Slices of whole CUBEs around what is True in [A, B, C], in its middle where it can be."""
    box = []
    for axis, length in enumerate(inside.shape):
        share = inside.mean(axis=tuple({0, 1, 2} - {axis}))
        used = np.flatnonzero(share > LEAST_INSIDE)
        first, last = (used[0], used[-1] + 1) if len(used) else (0, length)
        size = min(-(-(last - first) // CUBE) * CUBE, length)
        start = int(np.clip((first + last - size) // 2, 0, length - size))
        box.append(slice(start, start + size))
    return tuple(box)


def coarser(affine: np.ndarray, step: int) -> np.ndarray:
    """Affine of the grid whose voxels are cubes of `step` voxels."""
    result = np.array(affine, dtype=float)
    result[:3, :3] *= step
    result[:3, 3] += affine[:3, :3] @ np.full(3, (step - 1) / 2)
    return result
