"""What connects an inference engine with the cache: one package for each engine."""
