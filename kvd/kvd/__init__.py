"""The daemon: a pure core (`kvd.core`) and the shell that does its input and output."""

__version__ = "0.1.0"
