"""Experiments as configuration: what they train, on what, and the table they print."""
