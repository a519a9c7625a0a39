"""Measure activations: moments per channel, passes over batches, calibration and recalibration."""
