"""The error tree, and the one table between wire codes and exception classes.

KvdError
├── RequestError          you did wrong: the same request will fail again
│   ├── BadMessage            not MessagePack, wrong shape, wrong type, out of range
│   ├── UnsupportedVersion    another protocol version
│   ├── UnknownModel          a model id that was never registered here
│   ├── GeometryMismatch      this fingerprint is registered with another geometry
│   ├── ModelTooLarge         not even one block fits the budget or the quota
│   ├── UnknownContext        a context that this session has not opened
│   ├── StaleHandle           the sequence was released, or belongs to an earlier generation
│   ├── ForeignHandle         the context belongs to another session
│   ├── BadPosition           an append that does not start where the sequence's blocks end
│   ├── ReservationExceeded   an append beyond what alloc reserved
│   ├── BadStaging            staged bytes outside of the session's staging
│   ├── BadPayload            staged bytes that are not what the payload format demands
│   ├── SequenceEnded         the sequence has timed out and takes no more
│   ├── NotStored             alloc asked that nothing of this sequence is stored
│   ├── NoTenant              the daemon serves tenants, and this user is of none of them
│   └── Forbidden             for the administrator only
├── ResourceError         nothing is wrong, but there is no room now: later it may work
│   ├── NoSequenceFree        no sequence id came free before the deadline
│   ├── SequenceLimit         the daemon or the session has as many open as it may
│   ├── AllLeased             the budget is full and every block in it is in use
│   ├── BudgetTooSmall        what was asked can never fit this budget
│   ├── OverQuota             the tenant's quota has no room, and nothing more of its own can go
│   ├── TooMany               the session has as many of these open or waiting as one may
│   ├── NoSpace               the operating system has no memory, or no descriptor, for it
│   └── TooManySessions       max_sessions are connected
└── ServiceError          the other side, or the way there
    ├── UnknownSession        the daemon does not know this session (it was restarted)
    ├── InternalError         a fault of the daemon's own, reported instead of hidden
    ├── Unavailable           no daemon answers (raised by the client, never on the wire)
    └── DeadlineExceeded      no answer within the deadline (raised by the client)
"""

from collections.abc import Mapping

Detail = str | int | float | bool | None


class KvdError(Exception):
    """Base of everything kvd raises. `details` carries the evidence: what was asked, what was
    held."""

    code = "error"

    def __init__(self, message: str, **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Detail] = details

    def __str__(self) -> str:
        if not self.details:
            return self.message
        evidence = ", ".join(f"{name}={value!r}" for name, value in self.details.items())
        return f"{self.message} ({evidence})"


class RequestError(KvdError):
    code = "request"


class ResourceError(KvdError):
    code = "resource"


class ServiceError(KvdError):
    code = "service"


class BadMessage(RequestError):
    code = "bad_message"


class UnsupportedVersion(RequestError):
    code = "unsupported_version"


class UnknownModel(RequestError):
    code = "unknown_model"


class GeometryMismatch(RequestError):
    code = "geometry_mismatch"


class ModelTooLarge(RequestError):
    code = "model_too_large"


class UnknownContext(RequestError):
    code = "unknown_context"


class StaleHandle(RequestError):
    code = "stale_handle"


class ForeignHandle(RequestError):
    code = "foreign_handle"


class BadPosition(RequestError):
    code = "bad_position"


class ReservationExceeded(RequestError):
    code = "reservation_exceeded"


class BadStaging(RequestError):
    code = "bad_staging"


class BadPayload(RequestError):
    code = "bad_payload"


class SequenceEnded(RequestError):
    code = "sequence_ended"


class NotStored(RequestError):
    code = "not_stored"


class NoTenant(RequestError):
    code = "no_tenant"


class Forbidden(RequestError):
    code = "forbidden"


class NoSequenceFree(ResourceError):
    code = "no_sequence_free"


class SequenceLimit(ResourceError):
    code = "sequence_limit"


class AllLeased(ResourceError):
    code = "all_leased"


class BudgetTooSmall(ResourceError):
    code = "budget_too_small"


class OverQuota(ResourceError):
    code = "over_quota"


class TooMany(ResourceError):
    code = "too_many"


class NoSpace(ResourceError):
    code = "no_space"


class TooManySessions(ResourceError):
    code = "too_many_sessions"


class UnknownSession(ServiceError):
    code = "unknown_session"


class InternalError(ServiceError):
    code = "internal"


class Unavailable(ServiceError):
    code = "unavailable"


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


def _leaves(root: type[KvdError]) -> list[type[KvdError]]:
    """Every concrete class below `root`."""
    found: list[type[KvdError]] = []
    for child in root.__subclasses__():
        below = _leaves(child)
        found.extend(below or [child])
    return found


BY_CODE: Mapping[str, type[KvdError]] = {cls.code: cls for cls in _leaves(KvdError)}


def from_wire(code: str, message: str, details: dict[str, Detail]) -> KvdError:
    """The exception for an error reply; a code this version does not know becomes a ServiceError
    with that code."""
    error = BY_CODE.get(code, ServiceError)(message)
    error.code = code
    error.details = details
    return error
