"""`make bench`: what kvd costs beside its floor, measured in the same run. See __main__.py."""
