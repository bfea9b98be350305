"""From a generator to ONNX graphs; the only part of the engine that imports gdpo and torch."""
