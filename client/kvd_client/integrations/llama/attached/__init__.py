"""A `llama_cpp.Llama` that somebody else has made: what it computes with, and making it share."""
