"""The error family. Each takes one string, so it pickles across processes, and says what, where, how many,
the first case and what to do. The command line prints it as one line and exits with `exit_code`."""


class UmarvelError(Exception):
    """Anything a user can mend."""

    exit_code = 2


class ConfigError(UmarvelError, ValueError):
    """A setting is unknown, missing or nonsense."""


class DataError(UmarvelError, ValueError):
    """A data file says something it must not."""


class ShardError(UmarvelError, ValueError):
    """A stored shard is missing, broken, or was made with other settings."""


class CheckpointError(UmarvelError, ValueError):
    """A checkpoint is missing, incomplete, or was made with other settings."""


class EmbeddingError(UmarvelError, RuntimeError):
    """What a model gives is no embedding: not finite, not of unit norm, or the same for everything."""


class OutputError(UmarvelError, ValueError):
    """An output folder belongs to something else."""


class StorageError(UmarvelError, RuntimeError):
    """Object storage does not answer, or refuses."""


class ResourceError(UmarvelError, RuntimeError):
    """The machine or the cluster cannot place what was asked for."""


class TrainingError(UmarvelError, RuntimeError):
    """Training cannot go on: a loss or gradient is not finite."""
