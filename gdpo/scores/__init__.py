"""Scores of pictures: rewards of training and metrics of evaluation. `registry` lists them."""
