"""One file an experiment: a module here with an ``EXPERIMENT`` is known to ``factorkit reproduce``."""
