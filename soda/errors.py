"""Errors that a user can act on: each message names the thing, the value and the remedy."""


class SodaError(ValueError):
    """Any error of this library."""


class SodaFileError(SodaError):
    """A file is not a readable SODA adapter, or an adapter cannot be written as one."""


class SodaMixError(SodaError):
    """Adapters do not fit together, or do not fit the weights they are applied to."""


class SodaTrainingError(SodaError):
    """A training run cannot start or go on."""
