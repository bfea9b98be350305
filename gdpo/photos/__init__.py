"""From photos to training crops and batches."""
