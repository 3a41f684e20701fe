"""Blocks of K/V in and out of a context, the form of their bytes, and which contexts may share.

Knows nothing of the daemon.
"""
