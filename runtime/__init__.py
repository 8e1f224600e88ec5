"""Artifact -> prediction: images, preprocessing and one backend per runtime (no torch at import)."""
