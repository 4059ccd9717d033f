"""Landmarks in MNI space."""

import numpy as np

# Where `scans.alignment` puts the right centroids of tissues in MNI space, mm; the left are their
# mirror images. Medians of 20 label maps (those SynthSeg was trained with). The pose from these
# differs from the alignment of one anatomy by 1.1 degrees and 0.7 mm per axis (RMS).
LANDMARKS = {
    "white": (26.6, -18.5, 17.1),
    "cortex": (30.2, -17.8, 14.9),
    "thalamus": (12.3, -17.6, 6.4),
    "caudate": (15.5, 7.8, 9.0),
    "putamen": (25.6, -0.3, 0.1),
    "pallidum": (20.4, -4.0, -1.2),
    "hippocampus": (24.6, -21.5, -12.0),
    "amygdala": (22.7, -4.7, -16.4),
    "cerebellar_white": (16.3, -51.3, -27.3),
    "cerebellar_cortex": (22.6, -60.5, -31.1),
}

# Centers of the bins of the coordinates along x, y and z in MNI space, mm.
BIN_MM = 20.0
BINS = tuple(tuple(range(*ends, 20)) for ends in ((-80, 81), (-120, 81), (-80, 101)))
LOGITS = sum(len(bins) for bins in BINS)


def landmarks() -> np.ndarray:
    """[20, 3] mm in MNI space: left and right of each of LANDMARKS."""
    return np.array([(side * x, y, z) for x, y, z in LANDMARKS.values() for side in (-1, 1)])


def places_of(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [..., LOGITS] -> (mean [..., 3] mm in MNI space, standard deviation [...] mm)."""
    means, variance, first = [], 0.0, 0
    for bins in BINS:
        part, first = logits[..., first : first + len(bins)].astype(float), first + len(bins)
        share = np.exp(part - part.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        means.append(share @ np.array(bins, float))
        variance = variance + share @ np.array(bins, float) ** 2 - means[-1] ** 2
    return np.stack(means, axis=-1), np.sqrt(np.maximum(variance, 0))
