"""What several commands of kvctl are given: a model, and the token ids of a prompt. There is no
tokenizer here.
"""

import json
import sys
from typing import NamedTuple

from kvd_client.client import Client
from kvd_client.errors import BadMessage, RequestError
from kvd_client.kvctl.answer import BadUsage, check_model
from kvd_client.state import pack_tokens

MODEL_HELP = "its name, or how its fingerprint begins"
FILE_HELP = 'a JSON list of token ids ("-", and by default: standard input)'
_SHORTEST_FINGERPRINT = 8
"""Hex digits that name a model as well as its name does."""


class FoundModel(NamedTuple):
    """A model's arena fingerprint, and the names of the tenants that have it."""

    fingerprint: bytes
    tenants: list[str]

    def whose(self, asked: str) -> str:
        """The tenant that is meant: the one asked for, or else the only one that has the model."""
        if asked:
            return asked
        if len(self.tenants) > 1:
            raise RequestError(
                "several tenants have this model: say with --tenant which is meant, of "
                + ", ".join(self.tenants)
            )
        return self.tenants[0]


def find_model(client: Client, name: str) -> FoundModel:
    """The one model of this name, or that begins like this; raises RequestError."""
    rows = client.status()["models"]
    found = [row for row in rows if row["fingerprint"].startswith(name.lower())]
    if len(name) < _SHORTEST_FINGERPRINT or len({row["fingerprint"] for row in found}) != 1:
        found = check_model(client, name)
    fingerprints = sorted({row["fingerprint"] for row in found})
    if len(fingerprints) > 1:
        raise RequestError(
            f"several models are called {name!r}: say the beginning of a fingerprint instead, of "
            + ", ".join(each[:16] for each in fingerprints)
        )
    return FoundModel(bytes.fromhex(fingerprints[0]), sorted({str(row["tenant"]) for row in found}))


def read_tokens(path: str) -> bytes:
    """The packed token ids of a file. Read when all else is known to be right, since standard input
    may be a person. Raises BadUsage."""
    try:
        if path == "-":
            found = json.load(sys.stdin)
        else:
            with open(path) as file:
                found = json.load(file)
        if not isinstance(found, list) or not found:
            raise ValueError("it is not a list with something in it")
        return pack_tokens(found)
    except (OSError, ValueError, RecursionError, BadMessage) as error:
        raise BadUsage(f"a file with a JSON list of token ids, not {path!r}: {error}") from None
