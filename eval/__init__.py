"""Measuring how well lesions are found: metrics, thresholds, tables and figures."""
