"""Benchmarks: each script asks one question; README.md says which, and how it is called."""
