"""Training of the brain finder, `tf_lesion.scans.finder`, on painted heads."""

STAGES = ("paint", "train", "pack")
