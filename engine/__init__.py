"""The engine: export a generator to ONNX, build it for a backend, upscale pictures with it."""
