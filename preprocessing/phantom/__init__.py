"""Synthetic T2-like scans, healthy and with gliomas."""

HEALTHY, PATIENT, HELD_OUT = 0, 1, 2  # kinds of subjects, the second word of a subject's seed
GRADES = ("HGG", "LGG")  # patients alternate
