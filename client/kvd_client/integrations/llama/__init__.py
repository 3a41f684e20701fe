"""llama.cpp through llama-cpp-python: needs the extra `llama`.

`engine.py` owns a llama.cpp context and moves blocks of K/V in and out of it, `fingerprint.py` says
which contexts may share blocks. Neither knows of the daemon.
"""
