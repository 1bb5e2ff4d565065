"""Prepared copies and flow files, and the maps from their frames to those of the source."""
