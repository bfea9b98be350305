"""GDPO-SR: one-step generative image super-resolution, tuned by group direct preference optimisation.

Nothing heavy is imported here: `gdpo.kernels`, `gdpo.generator` and the commands load what they need when they need it.
"""

from engine.io.early import prepare_command

__version__ = "0.1.0"
prepare_command()  # where `python -m gdpo.x` is loading: Ctrl-C during imports is one line
