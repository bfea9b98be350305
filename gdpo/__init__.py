"""GDPO-SR: one-step generative image super-resolution, tuned by group direct preference optimisation.

Nothing is imported here: `gdpo.kernels`, `gdpo.generator` and the commands load what they need when they need it.
"""

__version__ = "0.1.0"
