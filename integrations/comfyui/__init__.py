"""Nodes for ComfyUI: load an engine folder, and enlarge pictures with it."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
