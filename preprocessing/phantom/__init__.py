"""Synthetic T2-like scans, healthy and with gliomas, strokes or multiple sclerosis."""

HEALTHY, PATIENT, HELD_OUT = 0, 1, 2  # kinds of subjects, the second word of a subject's seed
GRADES = ("HGG", "LGG")  # patients with gliomas alternate
GLIOMA, STROKE, MS = LESIONS = ("glioma", "stroke", "ms")
