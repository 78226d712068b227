"""Benchmarks: one file per claim, results as CSV rows."""
