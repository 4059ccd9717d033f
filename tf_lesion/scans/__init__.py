"""A scan: from its file to aligned, masked, normalized slices, and back."""

ALIGN_MODES = ("rigid", "center", "none")  # here, because every --help names them
MASK_MODES = ("auto", "nonzero", "atlas")
MOST_VOXELS = 2**29  # of a scan: 2 GB as float32; heads at 0.3 mm
