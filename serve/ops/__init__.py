"""The sampling core: counter-based random numbers and exact draws."""
