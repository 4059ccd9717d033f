"""The brain finder: where a brain is in any head scan, and where the scan lies in MNI space."""
