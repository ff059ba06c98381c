"""Probabilities from exported files: of raw logs, of rows in memory, and their metrics."""
