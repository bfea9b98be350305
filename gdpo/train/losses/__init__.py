"""Losses of NAOSD beside the pixel loss."""
