"""Conversations in, adapters out; and the nano organism, which makes the study runnable anywhere."""
