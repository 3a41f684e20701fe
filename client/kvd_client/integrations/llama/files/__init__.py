"""What model files say without llama.cpp: architecture, shape and size of K/V, content hash."""
