"""Samples in; verdicts, estimates, figures and a report out."""
