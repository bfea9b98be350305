"""Training: `python -m gdpo.train naosd|gdpo --config F.yaml [--any.key value]`."""
