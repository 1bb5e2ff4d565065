"""What has no subject of its own: errors, config, console, files, locks, weights."""
