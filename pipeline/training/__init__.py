"""Training: loop, step, losses, loader, checkpoints, and several processes."""
