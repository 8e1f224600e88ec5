"""Run folder -> artifact: export, calibration, INT8 dialects, verification."""
