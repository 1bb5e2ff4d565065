"""Grids of stages two and three over one store."""
