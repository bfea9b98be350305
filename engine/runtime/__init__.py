"""From a loaded folder and a picture to its upscaled version: numpy and one backend."""
