"""A scan: from its file to aligned, masked, normalized slices, and back."""

ALIGN_MODES = ("rigid", "center", "none")  # here, because every --help names them
MASK_MODES = ("auto", "nonzero", "atlas")
