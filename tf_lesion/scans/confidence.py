"""How far the brain and the alignment of a scan can be trusted, measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Limits set on painted heads of anatomies that the finder was not trained on; see
# `scans/finder/README.md`.
LEAST_OVERLAP = 0.8
LARGEST_DISAGREEMENT_MM = 6.0
LEAST_INFORMATION = 0.3  # nats
# Of these beyond, one alone passes, `DOUBTFUL_MM` with another does not.
DOUBTFUL_MM, DOUBTFUL_INFORMATION, DOUBTFUL_OVERLAP = 4.0, 0.38, 0.85
LEAST_COVERED = 0.4  # of the brain within the field of view: slabs of less were misplaced
WHOLE_BRAIN = 0.95  # of the brain within the field of view; less is a part


@dataclass(frozen=True)
class Confidence:
    """What was measured of a scan; NaN for what was not.

    Attributes:
        overlap: Dice of the mask and that of the atlas, which has the scale of this brain, within
            the field of view.
        disagreement_mm: median distance between where the finder sees the places of the brain and
            where its pose puts them.
        mutual_information: nats, of the aligned brain and the atlas's.
        moved_mm: how far the registration moved the brain from where it began.
        covered: share of the atlas's brain within the field of view.
        rim_share: share of a rim around the brain that is constant background.
    """

    overlap: float = math.nan
    disagreement_mm: float = math.nan
    mutual_information: float = math.nan
    moved_mm: float = math.nan
    covered: float = math.nan
    rim_share: float = math.nan

    def doubts(self) -> Iterator[str]:
        """Why the scan should not be used, if it should not."""
        apart = self.disagreement_mm > DOUBTFUL_MM
        least = DOUBTFUL_OVERLAP if apart else LEAST_OVERLAP
        if self.overlap < least:
            yield f"{self._overlaps_little()}, at least {least})"
        if self.disagreement_mm > LARGEST_DISAGREEMENT_MM:
            yield (
                f"the parts of the brain do not agree on where it lies (by "
                f"{self.disagreement_mm:.0f} mm, at most {LARGEST_DISAGREEMENT_MM:.0f})"
            )
        if self.covered < LEAST_COVERED and not math.isnan(self.overlap):  # after a registration
            yield (
                f"too little of the brain in the field of view to align it (about "
                f"{self.covered:.0%}, at least {LEAST_COVERED:.0%})"
            )
        doubtful = (
            apart
            and self.disagreement_mm <= LARGEST_DISAGREEMENT_MM
            and LEAST_INFORMATION <= self.mutual_information < DOUBTFUL_INFORMATION
        )
        if doubtful:
            yield (
                f"neither the parts of the brain (by {self.disagreement_mm:.1f} mm) nor its gray "
                f"values (mutual information {self.mutual_information:.2f} nats) agree well on "
                f"where it lies (at most {DOUBTFUL_MM:.0f} or at least {DOUBTFUL_INFORMATION})"
            )
        if self.mutual_information < LEAST_INFORMATION:
            yield (
                f"poor alignment to MNI (mutual information {self.mutual_information:.2f} nats, "
                f"at least {LEAST_INFORMATION})"
            )

    def cautions(self) -> Iterator[str]:
        """What is no reason to refuse the scan, but to look at it."""
        if self.disagreement_mm <= DOUBTFUL_MM and LEAST_OVERLAP <= self.overlap < DOUBTFUL_OVERLAP:
            yield (
                f"{self._overlaps_little()}, usually above {DOUBTFUL_OVERLAP}); look at the result."
            )

    def _overlaps_little(self):
        return f"the brain mask overlaps little with that of the atlas (Dice {self.overlap:.2f}"

    def facts(self) -> dict[str, float | None]:
        """JSON-serializable; None for what was not measured."""
        return {
            name: None if np.isnan(value) or np.isinf(value) else round(float(value), 3)
            for name, value in vars(self).items()
        }
