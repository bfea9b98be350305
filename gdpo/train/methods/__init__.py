"""The training methods, one module each: what is trained, and one step of it.

To add one: a module here with a subclass of `base.Method`, its options in gdpo/train/config.py (a subclass of
TrainConfig), and a row of METHODS in gdpo/train/__main__.py.
"""
