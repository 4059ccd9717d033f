"""How bright each tissue of a painted head is: like T1, T2, FLAIR, PD, or anything."""

import numpy as np

from preprocessing.phantom.heads.anatomy import CLASSES
from preprocessing.phantom.tissues import bounded_normal

# Share of painted heads by contrast. T2 most often: the scans of this project.
CONTRASTS = {"t2": 0.36, "t1": 0.1, "flair": 0.1, "pd": 0.1, "random": 0.34}
# Rough intensities, 1 the brightest tissue; by eye from textbook images, and spread widely below.
LEVELS = {
    "t2": {
        "white": 0.34, "gray": 0.45, "nuclei": 0.36, "fluid": 1.0, "bone": 0.08, "marrow": 0.3,
        "fat": 0.55, "muscle": 0.2, "skin": 0.4, "eye": 1.05, "mucosa": 0.8, "vessel": 0.1,
    },
    "t1": {
        "white": 0.8, "gray": 0.6, "nuclei": 0.66, "fluid": 0.2, "bone": 0.1, "marrow": 0.6,
        "fat": 1.0, "muscle": 0.5, "skin": 0.55, "eye": 0.2, "mucosa": 0.5, "vessel": 0.35,
    },
    "flair": {
        "white": 0.55, "gray": 0.7, "nuclei": 0.62, "fluid": 0.12, "bone": 0.1, "marrow": 0.4,
        "fat": 0.75, "muscle": 0.4, "skin": 0.5, "eye": 0.2, "mucosa": 0.7, "vessel": 0.15,
    },
    "pd": {
        "white": 0.72, "gray": 0.88, "nuclei": 0.82, "fluid": 0.92, "bone": 0.12, "marrow": 0.5,
        "fat": 0.85, "muscle": 0.6, "skin": 0.6, "eye": 0.9, "mucosa": 0.85, "vessel": 0.3,
    },
}  # fmt: skip
GROUPS = {
    "white": ("white", "cerebellar_white", "brainstem", "ventral_dc", "cord"),
    "gray": ("cortex", "hippocampus", "amygdala", "cerebellar_cortex", "accumbens"),
    "nuclei": ("thalamus", "caudate", "putamen", "pallidum"),
    "fluid": ("background", "csf", "ventricle", "choroid"),
    "bone": ("bone",),
    "marrow": ("marrow", "spongy"),
    "fat": ("fat",),
    "muscle": ("muscle",),
    "skin": ("skin",),
    "eye": ("eye", "lens"),
    "mucosa": ("mucosa",),
    "vessel": ("vessel", "artery"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
GROUP_SPREAD, CLASS_SPREAD = 0.18, 0.06  # of the logarithm
FAT_SUPPRESSED, SUPPRESSION = 0.3, (0.15, 0.6)  # share of heads; factor on fat and marrow
RANDOM_RANGE = (0.03, 1.0)
RANDOM_BY_GROUP = 0.7  # share of random heads whose classes follow their groups
NOISY_AIR, AIR_RANGE = 0.1, (0.0, 0.15)  # share of heads whose air is not dark; its intensity


def draw_contrast(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """(name, intensity of each of CLASSES [C] float32)."""
    name = str(rng.choice(list(CONTRASTS), p=list(CONTRASTS.values())))
    levels = _random_levels(rng) if name == "random" else _levels_like(rng, LEVELS[name])
    levels["air"] = rng.uniform(*AIR_RANGE) if rng.random() < NOISY_AIR else 0.0
    return name, np.array([levels[c] for c in CLASSES], np.float32)


def _levels_like(rng, prototype):
    groups = {
        group: level * np.exp(GROUP_SPREAD * bounded_normal(rng))
        for group, level in prototype.items()
    }
    if rng.random() < FAT_SUPPRESSED:
        factor = rng.uniform(*SUPPRESSION)
        groups["fat"] *= factor
        groups["marrow"] *= factor
    return {
        name: groups[group] * np.exp(CLASS_SPREAD * bounded_normal(rng))
        for name, group in GROUP_OF.items()
    }


def _random_levels(rng):
    if rng.random() > RANDOM_BY_GROUP:
        return {name: rng.uniform(*RANDOM_RANGE) for name in GROUP_OF}
    groups = {group: rng.uniform(*RANDOM_RANGE) for group in GROUPS}
    return {
        name: groups[group] * np.exp(2 * CLASS_SPREAD * bounded_normal(rng))
        for name, group in GROUP_OF.items()
    }
