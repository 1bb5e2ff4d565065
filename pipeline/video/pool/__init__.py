"""Decode videos in worker processes."""
