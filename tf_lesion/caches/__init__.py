"""HDF5 files of slices: what goes in, what comes out."""
