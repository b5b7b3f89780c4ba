"""Compute metrics, intervals, calibration and operating points. NumPy and pandas only."""
