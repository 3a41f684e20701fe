"""A worker for the tests of the service: the real client library, one line a request.

    use        alloc the tokens, store what is not there, and say what was found; never fails
    who        what it sees: its process and user id, and segments of kvd by name
    why        what keeps it from using a daemon, if anything does
    quit       (or the end of its input) leave

`matched` are the tokens that came from the cache, all of which were compared with what was stored;
`shared` says whether a daemon answered. With fail_open, `use` goes on without one.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import kvd_client
from tests.client.blocks import MODEL, payloads

TOKENS = list(range(7_000, 7_000 + 64))
PATIENT = 10.0
"""Seconds: a busy machine is no outage."""


def main() -> None:
    """Answer until the input ends. Arguments: the instance."""
    instance = sys.argv[1] if len(sys.argv) > 1 else "default"
    with (
        kvd_client.connect(
            instance=instance, fail_open=True, staging_bytes=1 << 20, timeout=PATIENT
        ) as client,
        client.open_context(MODEL, n_seq_max=2) as context,
    ):
        for line in sys.stdin:
            answer: Any
            match line.strip():
                case "use":
                    answer = use(client, context)
                case "who":
                    answer = who()
                case "why":
                    answer = why(instance)
                case _:
                    break
            print(json.dumps(answer), flush=True)


def use(client: kvd_client.Client, context: kvd_client.Context) -> dict[str, Any]:
    """What this worker finds of TOKENS; afterwards all of them are stored, if a daemon is there."""
    with context.alloc(TOKENS) as sequence:
        matched = sequence.matched_tokens
        right = all(
            bytes(sequence.block(index)) == payload
            for index, payload in enumerate(payloads(TOKENS[:matched]))
        )
        shared = sequence.shared
        try:
            rest = TOKENS[sequence.full_tokens :]
            if shared and rest:
                sequence.append(rest, payloads(TOKENS, sequence.full_tokens))
                client.flush()
        except kvd_client.errors.KvdError as error:
            return {"shared": False, "matched": matched, "right": right, "error": str(error)}
    return {"shared": shared, "matched": matched, "right": right}


def why(instance: str) -> str:
    """The error of a client that does not go on without a daemon; empty if there is none."""
    try:
        with kvd_client.connect(instance=instance, staging_bytes=0) as client:
            client.ping()
    except kvd_client.errors.Unavailable as error:
        return str(error)
    return ""


def who() -> dict[str, Any]:
    """What this worker sees of itself and of the daemon's memory."""
    segments = [path.name for path in Path("/dev/shm").glob("kvd-*")]
    return {"pid": os.getpid(), "uid": os.geteuid(), "segments": segments}


if __name__ == "__main__":
    main()
