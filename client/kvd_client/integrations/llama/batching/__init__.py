"""Continuous batching over one llama.cpp context: BatchingWorker is in worker.py."""
