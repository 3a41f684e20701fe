"""All errors that the library raises: those of the protocol, and a few of the client's own.

See kvd_proto.errors for the tree. `except kvd_client.errors.KvdError` catches every one of them.
"""

from kvd_proto.errors import (
    AllLeased,
    BadMessage,
    BadPayload,
    BadPosition,
    BadStaging,
    BudgetTooSmall,
    DeadlineExceeded,
    Forbidden,
    ForeignHandle,
    GeometryMismatch,
    InternalError,
    KvdError,
    ModelTooLarge,
    NoSequenceFree,
    NoSpace,
    NoTenant,
    NotStored,
    OverQuota,
    RequestError,
    ReservationExceeded,
    ResourceError,
    SequenceEnded,
    SequenceLimit,
    ServiceError,
    StaleHandle,
    TooMany,
    TooManySessions,
    Unavailable,
    UnknownContext,
    UnknownModel,
    UnknownSession,
    UnsupportedVersion,
)

__all__ = [
    "AllLeased",
    "BadMessage",
    "BadPayload",
    "BadPosition",
    "BadStaging",
    "BudgetTooSmall",
    "Closed",
    "DeadlineExceeded",
    "Forbidden",
    "ForeignHandle",
    "Forked",
    "GeometryMismatch",
    "InternalError",
    "KvdError",
    "ModelTooLarge",
    "NoSequenceFree",
    "NoSpace",
    "NoTenant",
    "NotStored",
    "OverQuota",
    "RequestError",
    "ReservationExceeded",
    "ResourceError",
    "SequenceEnded",
    "SequenceLimit",
    "ServiceError",
    "StagingFull",
    "StaleHandle",
    "TooMany",
    "TooManySessions",
    "Unavailable",
    "UnknownContext",
    "UnknownModel",
    "UnknownSession",
    "UnsupportedVersion",
    "ViewsAlive",
    "copy_error",
]


class Closed(RequestError):
    """The client, context or sequence has been closed."""

    code = "closed"


class Forked(RequestError):
    """The client was opened in another process. A child must open its own."""

    code = "forked"


class ViewsAlive(RequestError):
    """Arrays or slices over shared memory are still alive: drop them before it is let go."""

    code = "views_alive"


class StagingFull(ResourceError):
    """The session's staging has no room for this, and what fills it did not finish in time."""

    code = "staging_full"


def copy_error(error: KvdError) -> KvdError:
    """The same error to raise once more, or to keep.

    An exception that is kept, or raised a second time, holds the frames of the first time and all
    that their variables hold, views of blocks among it.
    """
    copy = type(error)(error.message)
    copy.code = error.code
    copy.details = dict(error.details)
    return copy
