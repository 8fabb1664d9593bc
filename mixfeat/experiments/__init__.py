"""The experiments of the command line: resumable, and importable on their own."""
