"""Training: a GradientTape loop, runs on disk, several devices."""
