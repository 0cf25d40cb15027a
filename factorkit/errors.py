"""Errors a user can mend: each message says what was wrong, where, and what to do."""


class FactorkitError(Exception):
    """Base of every error that stems from input, not from a bug; the command line prints it without a traceback."""


class ConfigError(FactorkitError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(FactorkitError, ValueError):
    """Images, masks or archives that cannot be used."""


class CheckpointError(FactorkitError, RuntimeError):
    """A checkpoint or run folder that is damaged, foreign, or in the way."""
