"""The ground floor every room shares: rows and tables, manifests, configuration, prompt rendering.

Nothing here imports torch, so that reading a table or listing a plan starts in a blink.
"""
