"""Every error the library raises, as one tree under `ReprobeError`.

A message says what happened, what exists, and what to do. Errors that mean "you called this wrongly" derive from
`UsageError` (the command line exits 2 for them); every other failure exits 1. Errors that are also a well-known
Python kind (a missing key, a missing file, a wrong value) derive from that kind too, so that code which does not
know reprobe still catches them.
"""


class ReprobeError(Exception):
    """Base of all errors raised on purpose by reprobe."""

    def __str__(self) -> str:  # KeyError would show the repr of the message, quotes and all
        return str(self.args[0]) if self.args else type(self).__name__


class UsageError(ReprobeError, ValueError):
    """The caller asked for something that cannot be: the message names the value and what exists."""


class UnknownSite(UsageError, KeyError):
    """A site that is malformed, beyond the model, or that this family does not have."""


class UnsupportedModel(UsageError):
    """A model family without a row in the architecture table, or a variant of one that the row does not cover."""


class UnsupportedOperation(UsageError):
    """A supported model, asked for something its family cannot do (e.g. intervening in an encoder)."""


class UnknownData(UsageError):
    """A data set, file or column that does not exist."""


class DataError(UsageError):
    """A data set that exists but is malformed: duplicate ids, a span outside its text, a missing field."""


class PromptTooLong(UsageError):
    """A prompt has more tokens than the model's context, and truncation was not asked for."""


class ArtifactExists(UsageError, FileExistsError):
    """The target of a write exists and neither resuming nor overwriting was asked for."""


class ArtifactMissing(UsageError, FileNotFoundError):
    """A store, direction or report that should be read does not exist."""


class IdentityMismatch(UsageError):
    """An artifact made with one model, plan or data set is used with another. Lists the differing fields."""


class SchemaMismatch(UsageError):
    """An artifact whose format is newer or older than what this version of reprobe reads."""


class CorruptArtifact(ReprobeError):
    """A file on disk does not hold what was written: bad checksum, malformed manifest, missing shard."""


class IncompleteStore(ReprobeError):
    """Rows were asked for whose shards have not been committed."""


class StoreLocked(ReprobeError):
    """Another process is writing this store."""


class StoreUnreachable(ReprobeError):
    """The place of a store cannot be reached or refuses access: no bucket, no credentials, no network."""


class ClusterFailed(ReprobeError):
    """A Ray cluster does not answer, or its workers die again and again. What was committed is kept."""


class DiskFull(ReprobeError, OSError):
    """No room left on the device. What was committed is kept."""


class FetchFailed(ReprobeError):
    """Weights or data could not be fetched: no network, or not what was pinned."""


class ModelLoadFailed(ReprobeError):
    """Weights are present but could not be turned into a model."""


class NotFitted(ReprobeError):
    """A reader was used before `fit`."""


class TargetUnreachable(ReprobeError):
    """No strength was found at which an intervention costs what was asked for. Says what was tried."""


class TrainingFailed(ReprobeError):
    """The loss of a training is no number any more. The last checkpoint is kept."""


class SelfCheckFailed(ReprobeError):
    """`lm.check()` found that a site identity does not hold: sites of this model cannot be trusted."""
