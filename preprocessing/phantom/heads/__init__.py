"""Painted heads: synthetic scans with skull in any contrast, pose and acquisition."""
