"""The errors that end a run with one clear message, and the exit code of each."""


class PraxinoError(Exception):
    """An expected failure: the command line prints its message, not a traceback, and exits with `exit_code`."""

    exit_code = 1


class ConfigError(PraxinoError):
    """A wrong key, value or path in the configuration."""

    exit_code = 2


class CheckpointError(PraxinoError):
    """No usable checkpoint, or one that does not fit the model."""

    exit_code = 3


class StorageError(PraxinoError):
    """The output directory cannot be written."""

    exit_code = 4


class NonFiniteError(PraxinoError):
    """Training produced non-finite losses or gradients for too many steps."""

    exit_code = 5


class DataError(PraxinoError):
    """No usable data, or too much of it failed."""

    exit_code = 6


class BusyError(PraxinoError):
    """Another run writes to this directory."""

    exit_code = 8
