"""A page to look at for every restored scan."""
