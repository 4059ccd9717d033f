"""From scans to caches of aligned, normalised slices."""
