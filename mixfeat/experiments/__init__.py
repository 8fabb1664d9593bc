"""Experiments: what the command line runs, resumable, and importable on its own."""
