"""Ablations: grids of trainings and finetunings over one store."""
