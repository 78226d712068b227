"""Prompts in, samples and exact answer distributions out."""
