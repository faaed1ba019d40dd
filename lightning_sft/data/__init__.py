"""From data files to batches: sources → rows → conversations → examples → plan → batches."""
