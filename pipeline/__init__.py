"""The parts of the package, from lists of videos to reports (docs/architecture.md)."""
