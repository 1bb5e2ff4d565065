"""Frozen image models: registry, preprocessing, identity and fingerprint."""
