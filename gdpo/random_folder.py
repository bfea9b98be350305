"""Make a model folder with random weights: `python -m gdpo.random_folder OUT --size mini`."""

from engine.io import cli
from gdpo.model.random_folder import main

if __name__ == "__main__":
    cli.run(main)
