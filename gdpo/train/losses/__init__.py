"""Losses of NAOSD beside the pixel loss, and (`preference`) of the algorithms that GDPO is compared with.

GDPO's own loss is `kernels/loss.py`.
"""
