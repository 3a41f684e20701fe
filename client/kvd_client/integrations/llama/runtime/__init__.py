"""llama.cpp through its bindings: a loaded model, a context that decodes, and their parameters.

Knows nothing of sharing.
"""
