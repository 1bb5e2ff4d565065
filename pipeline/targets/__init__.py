"""Targets of clips: which cached frames of a store they are made of, and how."""
