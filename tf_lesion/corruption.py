"""Generic local corruption of healthy slices, which the denoiser learns to undo.

    patch      another head shows through
    level      one intensity, with a texture
    diffuse    a little brighter or darker, its own contrast faded
    blurred    without detail
    curved     another gamma

Each has an irregular outline, an edge between sharp and as soft as it is wide, and an opacity.
After Kascenas et al. (MIDL 2022: coarse noise), Naval Marimont et al. (DISYRE, ISBI 2024: patches
of other images, of all opacities) and Tan et al. (PII, 2021: patches blended in). No lesion is
imitated: neither places, nor shapes, nor intensities of any disease are drawn.

Everything follows from the noise of `noise.slice_noise`, that is from (seed, step, slice); a patch
is taken from the next slice of the batch. Lengths are in mm, of slices that are 158 mm high.
"""

import math
from typing import Any

from keras import ops

from tf_lesion.caches.slices import BRAIN_FLOOR

Tensor = Any  # of Keras's backend
Tensors = dict[str, Tensor]  # by name

FIELD_OF_VIEW_MM = 158.0  # along the height of a slice
BRIGHTEST = 1.2  # highest intensity; that of a brain is 1
BLOBS = 8  # most in a slice
KINDS = {"patch": 0.25, "level": 0.25, "diffuse": 0.35, "blurred": 0.08, "curved": 0.07}
# Share of slices with as many blobs of such radii: (share, fewest, most, smallest and largest mm).
CROWDS = ((0.1, 0, 0, 5.0, 5.0), (0.65, 1, 3, 4.0, 56.0), (0.25, 3, BLOBS, 2.5, 9.0))
OPACITY = (0.2, 1.0)
LONGEST = 2.0  # ratio of half axes
OUTLINE = 0.45  # standard deviation of the outline, in radii
OUTLINE_MM = (7.0, 22.0)  # scales of its fields, for small blobs and large ones
SMALL_MM = 12.0
TEXTURE, TEXTURE_MM = 0.12, 9.0  # of a level
LEVEL = (0.0, 1.05)
BRIGHTER, BRIGHTER_SHIFT, DARKER_SHIFT = 0.7, (0.05, 0.5), (0.05, 0.3)  # share; intensity
FADED = (0.1, 1.0)  # factor on the contrast that is left
CURVE = 1.0  # largest logarithm of gamma
BLUR_MM = 5.0  # standard deviation
# How heads and scanners differ: rotation, shift and size of the slice; gamma, gain, bias, blur and
# noise.
TURN_DEGREES, SHIFT_MM, SIZE_SPREAD = 12.0, 8.0, 0.12
GAMMA_SPREAD, GAIN_SPREAD, BIAS_SPREAD, BIAS_MM = 0.22, 0.05, 0.06, 60.0
SHARPER, SOFTER, SOFT_MM = 0.3, 0.7, 2.0
NOISE = 0.04
_SLICE_DRAWS = (
    "crowd", "number", "turn", "x", "y", "size", "side", "gamma", "gain", "soft", "noise",
)  # fmt: skip
_BLOB_DRAWS = (
    "place", "radius", "length", "angle", "edge", "opacity", "kind", "level", "texture",
    "bright", "shift", "fade", "curve",
)  # fmt: skip


def noise_shapes(size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the noise that one slice of `size` pixels needs."""
    pixel_mm = FIELD_OF_VIEW_MM / size[0]

    def field(scale_mm):
        return (*(math.ceil(length * pixel_mm / scale_mm) + 1 for length in size), 1)

    return {
        "slice_draws": (len(_SLICE_DRAWS),),
        "blob_draws": (BLOBS, len(_BLOB_DRAWS)),
        "outline_small": field(OUTLINE_MM[0]),
        "outline_large": field(OUTLINE_MM[1]),
        "texture_field": field(TEXTURE_MM),
        "bias_field": field(BIAS_MM),
        "grain": (*size, 2),
    }


def corrupted(images: Tensor, noise: Tensors) -> tuple[Tensor, Tensor]:
    """Another head, and the same corrupted.

    Args:
        images: [B, H, W, 1] healthy slices, above 0 in the brain alone.
        noise: what `noise_shapes` names, [B, ...] standard normal.

    Returns:
        (healthy [B, H, W, 1], corrupted [B, H, W, 1]); both 0 outside of the brain.
    """
    size = images.shape[1:3]
    draws = dict(
        zip(_SLICE_DRAWS, ops.unstack(_uniform(noise["slice_draws"]), axis=1), strict=True)
    )
    fields = {
        name: ops.image.resize(noise[name], size, "bicubic")
        for name in ("outline_small", "outline_large", "texture_field", "bias_field")
    }
    healthy = varied(images, draws, fields["bias_field"], noise["grain"][..., :1])
    brain = healthy > 0
    blobs = dict(zip(_BLOB_DRAWS, ops.unstack(_uniform(noise["blob_draws"]), axis=2), strict=True))
    opacity = opacities(healthy, blobs, draws, fields)
    fields["texture"] = 0.7 * fields["texture_field"] + 0.5 * noise["grain"][..., 1:]
    shown = healthy
    for number in range(BLOBS):
        blob = {name: values[:, number, None, None, None] for name, values in blobs.items()}
        here = opacity[:, number, ..., None]
        value = blob_values(shown, here, blob, fields, donor=ops.roll(healthy, 1, axis=0))
        shown = shown + here * (value - shown)
    return healthy, ops.where(brain, ops.clip(shown, BRAIN_FLOOR, BRIGHTEST), 0.0)


# How heads and scanners differ ------------------------------------------------------------------


def varied(images: Tensor, draws: Tensors, bias: Tensor, grain: Tensor) -> Tensor:
    """The slices turned, shifted, scaled or mirrored, with other intensities, blur and noise."""
    weight = ops.cast(images > 0, images.dtype)
    rows, columns = _origins(draws, images.shape[1:3])
    moved = _sampled(ops.concatenate([images, weight], axis=3), rows, columns)
    moved, weight = moved[..., :1], moved[..., 1:]
    brain = weight >= 0.5
    values = ops.divide_no_nan(moved, weight)  # means over brain alone: no dark rim
    gamma = ops.exp(_between(draws["gamma"], -GAMMA_SPREAD, GAMMA_SPREAD))
    gain = _between(draws["gain"], 1 - GAIN_SPREAD, 1 + GAIN_SPREAD)
    values = (
        _columns(gain)
        * ops.exp(BIAS_SPREAD * bias)
        * ops.power(ops.maximum(values, BRAIN_FLOOR), _columns(gamma))
    )
    values = ops.where(brain, values, 0.0)
    softness = _columns(_between(draws["soft"], -SHARPER, SOFTER))
    values += softness * (_blurred(values, brain, SOFT_MM) - values)
    values += NOISE * _columns(draws["noise"]) * grain
    return ops.where(brain, ops.clip(values, BRAIN_FLOOR, BRIGHTEST), 0.0)


def _origins(draws, size):
    """Row and column [B, H, W] of the slice that each voxel of the result comes from."""
    height, width = size
    middle = [(height - 1) / 2, (width - 1) / 2]
    rows = (ops.arange(height, dtype="float32") - middle[0])[None, :, None]
    columns = (ops.arange(width, dtype="float32") - middle[1])[None, None]
    turn = math.radians(TURN_DEGREES) * _plane(_between(draws["turn"], -1.0, 1.0))
    factor = ops.exp(_plane(_between(draws["size"], -SIZE_SPREAD, SIZE_SPREAD)))
    side = ops.where(_plane(draws["side"]) < 0.5, -1.0, 1.0)  # those of a head lie along the height
    across, along = factor * ops.cos(turn), factor * ops.sin(turn)
    pixels = SHIFT_MM * height / FIELD_OF_VIEW_MM
    y, x = (pixels * _plane(_between(draws[axis], -1.0, 1.0)) for axis in ("y", "x"))
    return (
        middle[0] + y + along * columns + across * side * rows,
        middle[1] + x + across * columns - along * side * rows,
    )


def _sampled(images, rows, columns):
    """Linear between pixels, 0 beyond the edges: [B, H, W, C] at places [B, H, W]."""
    height, width, channels = images.shape[1:]
    framed = ops.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    flat = ops.reshape(framed, [-1, (height + 2) * (width + 2), channels])
    rows = ops.clip(rows + 1, 0.0, height + 0.999)
    columns = ops.clip(columns + 1, 0.0, width + 0.999)
    top, left = ops.floor(rows), ops.floor(columns)
    first = ops.cast(top, "int32") * (width + 2) + ops.cast(left, "int32")
    down, right = (rows - top)[..., None], (columns - left)[..., None]

    def at(step):
        places = ops.reshape(first + step, [-1, height * width, 1])
        return ops.reshape(ops.take_along_axis(flat, places, axis=1), [-1, height, width, channels])

    above = at(0) + right * (at(1) - at(0))
    below = at(width + 2) + right * (at(width + 3) - at(width + 2))
    return above + down * (below - above)


def _blurred(values, brain, sigma_mm):
    """Gaussian within the brain."""
    sigma = sigma_mm * values.shape[1] / FIELD_OF_VIEW_MM
    reach = math.ceil(2 * sigma)
    line = ops.exp(-0.5 * (ops.arange(-reach, reach + 1, dtype=values.dtype) / sigma) ** 2)
    both = ops.concatenate([values, ops.cast(brain, values.dtype)], axis=3)
    for shape in ([-1, 1, 1, 1], [1, -1, 1, 1]):
        kernel = ops.tile(ops.reshape(line, shape), [1, 1, 2, 1])
        both = ops.depthwise_conv(both, kernel, 1, "same")
    return ops.divide_no_nan(both[..., :1], both[..., 1:])


# Blobs ------------------------------------------------------------------------------------------


def opacities(images: Tensor, blobs: Tensors, draws: Tensors, fields: Tensors) -> Tensor:
    """How much of each blob is seen where, [B, BLOBS, H, W] from 0 to 1.

    Args:
        images: [B, H, W, 1]; blobs are centered in the brain.
        blobs: draws [B, BLOBS] of `_BLOB_DRAWS`, from 0 to 1.
        draws: draws [B] of `_SLICE_DRAWS`.
        fields: smooth noise [B, H, W, 1] for the outlines.
    """
    height, width = images.shape[1:3]
    present, smallest, largest = _crowd(draws)
    radius = smallest * ops.power(largest / smallest, blobs["radius"])  # mm
    y, x = _centers(images, blobs["place"])
    rows = ops.arange(height, dtype="float32")[:, None] - y[..., None, None]
    columns = ops.arange(width, dtype="float32")[None] - x[..., None, None]
    angle = math.pi * blobs["angle"][..., None, None]
    length = ops.power(LONGEST, blobs["length"] - 0.5)[..., None, None]
    u = (ops.cos(angle) * rows + ops.sin(angle) * columns) / length
    v = (ops.cos(angle) * columns - ops.sin(angle) * rows) * length
    small = ops.cast(radius < SMALL_MM, "float32")[..., None, None]
    outlines = (fields[name][:, None, ..., 0] for name in ("outline_small", "outline_large"))
    of_small, of_large = outlines
    outline = small * of_small + (1 - small) * of_large
    pixels = radius[..., None, None] * height / FIELD_OF_VIEW_MM
    distance = ops.sqrt(u**2 + v**2) / pixels + OUTLINE * outline  # in radii
    # At least a pixel wide, at most as wide as the blob.
    edge = ops.maximum(blobs["edge"][..., None, None] ** 2, 1.0 / pixels)
    inside = ops.clip(0.5 + (1.0 - distance) / edge, 0.0, 1.0)
    opacity = _between(blobs["opacity"], *OPACITY) * present
    return opacity[..., None, None] * inside


def _crowd(draws):
    """(which blobs there are [B, BLOBS] 0 or 1, smallest and largest radius [B, 1] mm)."""
    ends = ops.array([sum(row[0] for row in CROWDS[: k + 1]) for k in range(len(CROWDS) - 1)])
    place = ops.sum(ops.cast(draws["crowd"][:, None] >= ends, "int32"), axis=1)
    _, fewest, most, smallest, largest = (
        ops.take(ops.array(column, "float32"), place) for column in zip(*CROWDS, strict=True)
    )
    count = fewest + ops.floor(draws["number"] * (most - fewest + 1))
    present = ops.arange(BLOBS, dtype="float32") < count[:, None]
    return ops.cast(present, "float32"), smallest[:, None], largest[:, None]


def _centers(images, place):
    """(row, column) of a pixel of the brain for each draw [B, BLOBS]; float32."""
    height, width = images.shape[1:3]
    inside = ops.cast(ops.reshape(images, [-1, height * width]) > 0, "float32")
    counted = ops.cumsum(inside, axis=1)
    wanted = place * counted[:, -1:]
    pixel = ops.argmax(counted[:, None] > wanted[..., None], axis=2)
    return ops.cast(pixel // width, "float32"), ops.cast(pixel % width, "float32")


def blob_values(
    shown: Tensor, opacity: Tensor, blob: Tensors, fields: Tensors, *, donor: Tensor
) -> Tensor:
    """What a blob shows in place of the slice, [B, H, W, 1].

    Args:
        shown: [B, H, W, 1], the slice with earlier blobs.
        opacity: [B, H, W, 1].
        blob: draws [B, 1, 1, 1] of `_BLOB_DRAWS`.
        fields: `texture` [B, H, W, 1].
        donor: [B, H, W, 1], slices of other heads.
    """
    brain = shown > 0
    share = ops.sum(opacity * shown, axis=(1, 2), keepdims=True)
    mean = ops.divide_no_nan(share, ops.sum(opacity, axis=(1, 2), keepdims=True))
    level = _between(blob["level"], *LEVEL)
    level += TEXTURE * blob["texture"] * fields["texture"]
    brighter = blob["bright"] < BRIGHTER
    shift = ops.where(
        brighter, _between(blob["shift"], *BRIGHTER_SHIFT), -_between(blob["shift"], *DARKER_SHIFT)
    )
    faded = mean + _between(blob["fade"], *FADED) * (shown - mean)
    values = {
        "patch": ops.where(donor > 0, donor, level),
        "level": level,
        "diffuse": faded + shift,
        "blurred": _blurred(shown, brain, BLUR_MM),
        "curved": ops.power(
            ops.maximum(shown, BRAIN_FLOOR), ops.exp(_between(blob["curve"], -CURVE, CURVE))
        ),
    }
    value, end = values["patch"], 0.0
    for kind, rate in KINDS.items():
        value = ops.where(blob["kind"] >= end, values[kind], value)
        end += rate
    return value


def _uniform(normal):
    """Standard normal -> uniform in (0, 1)."""
    return 0.5 + 0.5 * ops.erf(normal / math.sqrt(2.0))


def _between(uniform, low, high):
    return low + (high - low) * uniform


def _columns(values):
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def _plane(values):
    """[B] -> [B, 1, 1]."""
    return values[:, None, None]
