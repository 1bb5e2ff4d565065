"""From frame indices to a clip that a model takes."""
