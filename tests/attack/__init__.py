"""Attacks on the product, by the thousand: `python -m tests.attack`. docs/reliability.md has the result."""
