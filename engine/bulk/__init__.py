"""Many pictures, from any storage to any storage, on one machine or many: `python -m engine.bulk IN OUT`."""
