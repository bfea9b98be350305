"""The training methods, one module each: what is trained, and one step of it."""
