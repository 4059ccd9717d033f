"""The brain finder: where a brain is in any head scan, and where the scan lies in MNI space.

Not in use yet: no weights are shipped, and `scans.prepare` does without. `python -m
preprocessing.finder` trains them; its `finder.npz` belongs in this folder.
"""
