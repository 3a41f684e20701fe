"""The daemon: a pure core (`kvd.core`) and the shell that does its input and output."""

from importlib.metadata import version

__version__ = version("kvd-cache")
