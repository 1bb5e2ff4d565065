"""Reports of runs and ablations, and summaries of stores, as tables and pages."""
