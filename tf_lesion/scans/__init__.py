"""A scan: from its file to aligned, masked, normalized slices, and back."""
