"""T2 intensities of the phantom's tissues, and FreeSurfer's numbers for them."""

import numpy as np

# T2 intensity relative to cerebral white matter: mean, and spread between subjects. By medians of
# four T2 scans outside their lesions: three of multiple sclerosis at 3 T (Lesjak et al.,
# Neuroinformatics 2017) and one of a stroke; cortex and CSF, whose medians are contaminated by
# their neighbors, by the histograms of `preprocessing.cohort_figure`, and bone by eye. Nuclei rich
# in iron are dark: the pallidum has 0.60 to 0.75 in those scans.
TISSUES = {
    "background": (3.2, 0.2),  # the gap between brain and skull, painted as CSF
    "white": (1.0, 0.0),
    "cortex": (1.21, 0.08),
    "csf": (3.2, 0.2),
    "ventricle": (3.3, 0.2),
    "choroid": (3.0, 0.3),
    "thalamus": (0.93, 0.07),
    "caudate": (1.05, 0.09),
    "putamen": (1.02, 0.07),
    "pallidum": (0.69, 0.06),
    "hippocampus": (1.22, 0.09),
    "amygdala": (1.18, 0.09),
    "accumbens": (1.08, 0.08),
    "ventral_dc": (0.92, 0.07),
    "brainstem": (1.0, 0.07),
    "cerebellar_white": (1.0, 0.06),
    "cerebellar_cortex": (1.13, 0.07),
    "vessel": (0.55, 0.1),
    "bone": (0.4, 0.08),  # of the base of the skull, where the brain mask bridges it
}
TISSUE_INDEX = {name: number for number, name in enumerate(TISSUES)}
FLUIDS = ("background", "csf", "ventricle", "choroid")
GRAY_CONTRAST_SPREAD = 0.12  # factor on (intensity - 1), shared by the solid tissues of a subject
FLUID_SPREAD = 0.08  # factor on the intensity of all fluids of a subject
LARGEST_DEVIATION = 2.0  # standard deviations; normal draws are cut there

# FreeSurferColorLUT.txt; of paired structures left and right come first. Lesions of white matter
# (25, 57, 77-79) are painted as white matter, because the healthy must have none.
FREESURFER = {
    "white": (2, 41, 25, 57, 77, 78, 79, 85, 251, 252, 253, 254, 255),
    "cortex": (3, 42),
    "csf": (24,),
    "ventricle": (4, 5, 14, 15, 43, 44, 72),
    "choroid": (31, 63, 136, 137, 163, 164),  # the last four: unnamed, lie along the ventricles
    "thalamus": (10, 49, 9, 48),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "accumbens": (26, 58),
    "ventral_dc": (28, 60),
    "brainstem": (16,),
    "cerebellar_white": (7, 46),
    "cerebellar_cortex": (8, 47),
    "vessel": (30, 62),
}
OTHER_TISSUE = "cortex"  # of cerebral numbers not listed above
FIRST_EXTRACEREBRAL = 500  # skull, skin, eyes and so on from here
BONE = (514, 515)  # cancellous, cortical
HEMISPHERES = ((2, 3), (41, 42))  # cerebral white matter and cortex, left and right


def draw_intensities(rng: np.random.Generator) -> dict[str, float]:
    """Intensities of one subject by tissue name, relative to white matter."""
    contrast = 1 + GRAY_CONTRAST_SPREAD * bounded_normal(rng)
    fluid = 1 + FLUID_SPREAD * bounded_normal(rng)
    levels = {}
    for name, (mean, spread) in TISSUES.items():
        level = mean + spread * bounded_normal(rng)
        levels[name] = level * fluid if name in FLUIDS else 1 + contrast * (level - 1)
    return levels


def tissue_of_labels(labels: np.ndarray) -> np.ndarray:
    """FreeSurfer numbers [...] -> indices of TISSUES [...] uint8; outside, all but bone is 0."""
    lookup = np.full(FIRST_EXTRACEREBRAL, TISSUE_INDEX[OTHER_TISSUE], np.uint8)
    lookup[0] = TISSUE_INDEX["background"]
    for name, numbers in FREESURFER.items():
        lookup[list(numbers)] = TISSUE_INDEX[name]
    tissue = lookup[np.where(labels < FIRST_EXTRACEREBRAL, labels, 0)]
    tissue[np.isin(labels, BONE)] = TISSUE_INDEX["bone"]
    return tissue


def bounded_normal(rng: np.random.Generator, size: int | None = None) -> float | np.ndarray:
    """Standard normal numbers cut at LARGEST_DEVIATION."""
    return np.clip(rng.standard_normal(size), -LARGEST_DEVIATION, LARGEST_DEVIATION)
