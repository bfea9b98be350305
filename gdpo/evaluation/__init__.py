"""What `python -m gdpo.evaluate` is made of: sources of pictures, scores, comparison, report."""
