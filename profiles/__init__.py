"""Artifact x device -> record: latency, memory, accuracy, comparison, report (no torch at import)."""
