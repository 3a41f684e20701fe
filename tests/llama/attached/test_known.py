"""Which tokens of a context are known."""

import numpy as np
import pytest

from kvd_client.integrations.llama.attached.hooks import Hooks
from kvd_client.integrations.llama.attached.known import KnownTokens, common_prefix


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [3, 2], 0)],
)
def test_the_common_prefix(one: list[int], other: list[int], length: int) -> None:
    assert common_prefix(np.array(one, np.int32), np.array(other, np.int32)) == length


def test_what_follows_something_unknown_is_unknown() -> None:
    known = KnownTokens(10)
    known.append(0, [1, 2, 3])
    known.append(3, [4])
    assert known.tokens.tolist() == [1, 2, 3, 4]
    known.append(2, [5])
    assert known.tokens.tolist() == [1, 2, 5]
    known.append(6, [6])
    assert known.tokens.tolist() == [1, 2, 5]
    known.cut(1)
    known.cut(5)
    assert known.tokens.tolist() == [1]
    known.append(1, range(20))
    assert known.tokens.tolist() == [1], "more than the context has room for"
    known.cut(-1)
    assert known.length == 0


def test_hooks_put_back_what_was_there() -> None:
    class Target:
        def one(self, number: int) -> str:
            return f"class {number}"

        def two(self) -> str:
            return "class"

    target = Target()
    target.__dict__["two"] = lambda: "own"
    hooks = Hooks(target, {"one": lambda number: f"hook {number}", "two": lambda: "hook"})
    assert (target.one(1), target.two()) == ("hook 1", "hook")
    assert (hooks.call(target, "one", number=2), hooks.call(target, "two")) == ("class 2", "own")
    hooks.remove(target)
    assert (target.one(3), target.two()) == ("class 3", "own")
