"""The error tree: one class for each code, drawn as it is, with evidence."""

import re
from typing import Any

import pytest

from kvd_proto import errors
from kvd_proto.errors import (
    BY_CODE,
    KvdError,
    RequestError,
    ResourceError,
    ServiceError,
    StaleHandle,
    from_wire,
)


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+)(\s|$)", line)
        if found is None or not hasattr(errors, found[2]):
            continue
        depth = len(found[1]) // 4
        path[depth:] = [found[2]]
        if depth:
            drawn[found[2]] = path[depth - 1]
    real = {
        cls.__name__: cls.__base__.__name__
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, KvdError) and cls is not KvdError
    }
    assert drawn == real


def test_codes_are_unique_and_lead_back_to_their_class() -> None:
    branches = {RequestError, ResourceError, ServiceError}
    concrete = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, KvdError) and cls not in {KvdError, *branches}
    ]
    assert len(BY_CODE) == len(concrete)
    for cls in concrete:
        assert BY_CODE[cls.code] is cls
        assert cls.__base__ in branches
        assert re.fullmatch(r"[a-z_]{1,40}", cls.code)


@pytest.mark.parametrize("code", BY_CODE)
def test_from_wire_makes_the_class_with_all_it_was_told(code: str) -> None:
    error = from_wire(code, "why", {"got": 3})
    assert type(error) is BY_CODE[code]
    assert (error.code, error.message, error.details) == (code, "why", {"got": 3})


@pytest.mark.parametrize("code", ["", "error", "request", "quota_exceeded"])
def test_from_wire_keeps_a_code_that_it_does_not_know(code: str) -> None:
    error = from_wire(code, "why", {})
    assert type(error) is ServiceError
    assert error.code == code
    assert ServiceError.code == "service"


def test_text_has_the_evidence() -> None:
    details: dict[str, Any] = {"seq_id": 3, "generation": None, "request": "a\nb"}
    assert str(StaleHandle("gone", **details)) == (
        "gone (seq_id=3, generation=None, request='a\\nb')"
    )
    assert str(StaleHandle("gone")) == "gone"


def test_errors_of_one_branch_can_be_caught_together() -> None:
    with pytest.raises(RequestError):
        raise StaleHandle("gone")
    assert not issubclass(StaleHandle, ResourceError | ServiceError)
