"""Open, probe and decode videos: exact frames, one geometry, child processes against bad files."""
