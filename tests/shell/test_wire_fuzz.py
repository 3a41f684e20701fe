"""A sample of the wire fuzz; the long run is tests/soak/test_wire_fuzz.py."""

import pytest

from tests.shell import fuzz
from tests.shell.conftest import Bystander
from tests.support import Daemon

MESSAGES = 20_000
SEED = 20261125


@pytest.mark.usefixtures("nothing_is_lost")
def test_hostile_messages_hurt_nobody(daemon: Daemon, bystander: Bystander):
    tally = fuzz.run(daemon, bystander, MESSAGES, SEED)
    # It has reached what it wants to attack.
    assert tally.answers["success"] > MESSAGES // 20
    assert tally.answers["bad_message"] > MESSAGES // 10
    for code in ("stale_handle", "foreign_handle", "bad_payload", "bad_staging", "bad_position"):
        assert tally.answers[code], code
