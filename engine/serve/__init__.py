"""The HTTP service: `python -m engine.serve` (docs/serve.md)."""
