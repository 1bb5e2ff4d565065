"""Helpers of no subject of their own: errors, config, console, files, locks, weights."""
