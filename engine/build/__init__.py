"""From an exported folder to an optimised model or a plan of one backend."""
