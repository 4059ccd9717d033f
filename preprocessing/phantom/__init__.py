"""Synthetic T2-like scans, healthy and with gliomas."""
