"""The errors of training; each docstring is the message for the user.

No class knows HTTP: ``tinkerapi.api.errors`` maps classes to status codes in one table.
"""


class TrainingError(Exception):
    """The training request failed."""

    category = "user"
    """Who caused it: ``user``, ``server`` or ``unknown``."""

    def __str__(self) -> str:
        return super().__str__() or (self.__class__.__doc__ or "").strip()


class InvalidRequest(TrainingError):
    """The request is not valid."""


class InvalidDatum(InvalidRequest):
    """A datum is invalid; the message names datum, field and position."""


class LimitExceeded(InvalidRequest):
    """The request is larger than this server allows."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room in the model's context."""


class StorageQuotaExceeded(LimitExceeded):
    """You have reached the storage limit of one user; delete some of your data first."""


class TokenQuotaExceeded(LimitExceeded):
    """You have used the tokens that one user may use in a day; continue tomorrow."""


class SessionNotFound(TrainingError):
    """No session of this id exists."""


class SessionFinished(InvalidRequest):
    """The session was finished, so it accepts no further requests."""


class SamplingSessionNotFound(TrainingError):
    """No sampling session of this id exists."""


class RunNotFound(TrainingError):
    """No model of this name exists."""


class RunExists(TrainingError):
    """A model of this name already exists."""


class RunNotCreated(TrainingError):
    """The model could not be created."""


class CheckpointNotFound(TrainingError):
    """No checkpoint exists at this path."""


class CheckpointExists(TrainingError):
    """A checkpoint of this name already exists and overwrite was not set."""


class BaseModelNotFound(TrainingError):
    """This server does not serve that base model."""


class DeviceNotFound(TrainingError):
    """This machine does not have the base model's device."""

    category = "server"


class WorkerDisagrees(TrainingError):
    """This worker's environment differs from that of the base model's other workers."""

    category = "server"


class NonFiniteResult(TrainingError):
    """The computation produced NaN or infinity; weights and gradients are unchanged."""


class GradientDropped(NonFiniteResult):
    """The accumulated gradient is too large for a step and was dropped; weights are unchanged."""


class OutOfMemory(TrainingError):
    """The device has no memory left for this request."""

    category = "server"


class StorageFull(TrainingError):
    """The data folder's disk is full; free some space and send the request again."""

    category = "server"


class StorageFailed(TrainingError):
    """The data folder cannot be written; check its disk and send the request again."""

    category = "server"


class RunLost(TrainingError):
    """The run's state cannot be rebuilt; load its last checkpoint into a new run."""

    category = "server"
