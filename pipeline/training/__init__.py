"""Training: loop, step, losses, loader, checkpoints, and launch of several processes."""
