"""From a scan to lesion maps on its own grid."""
