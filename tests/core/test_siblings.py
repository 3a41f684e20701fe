"""Many children of one block answer as few do: each question is asked of a plain list, too."""

from random import Random

import pytest

from kvd.core.siblings import Siblings
from kvd.core.tree import FILLING, SEALED, Block
from tests.core.driver import packed, path_of, siblings_in_runs_of

TOKENS = (0, 1, 256, 1 << 24)
"""256 sorts before 1 as bytes do."""


def path(random: Random) -> tuple[int, ...]:
    return tuple(random.choices(TOKENS, k=random.randint(1, 4)))


def block(parent: Block, tokens: tuple[int, ...], state: str) -> Block:
    made = Block(None, parent, packed(*tokens), b"", 0)
    made.state = state
    return made


class Families:
    """The same children below two roots, and in runs of different lengths."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.roots = [Block(None, None, b"", b"", 0) for _ in range(2)]

    def do(self, action):
        """Of both; returns what they answer."""
        answers = []
        for run, root in zip((2, 1 << 20), self.roots, strict=True):
            siblings_in_runs_of(run, self.monkeypatch)
            answers.append(action(root))
        return answers


def told(found):
    return found and path_of(found)


@pytest.mark.parametrize("seed", range(30))
def test_many_children_answer_as_few_do(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(seed)
    families = Families(monkeypatch)
    there: set[tuple[int, ...]] = set()
    most = 0
    for step in range(300):
        tokens = path(random)
        if tokens not in there and random.random() < (0.8 if step < 200 else 0.1):
            there.add(tokens)
            state = random.choice((SEALED, SEALED, FILLING))
            families.do(lambda root, t=tokens, s=state: root.add(block(root, t, s)))
        elif there and random.random() < 0.7:
            tokens = random.choice(sorted(there))
            there.remove(tokens)
            families.do(lambda root, t=tokens: root.remove(root.child(packed(*t))))
        asked = packed(*path(random))
        first, last = sorted(random.choices(range(len(there) + 3), k=2))
        for question in (
            lambda root: [path_of(child) for child in root.children],
            lambda root: len(root.children),
            lambda root, a=asked: told(root.child(a)),
            lambda root, a=asked: [path_of(each) for each in root.prefixes(a)],
            lambda root, a=asked: told(root.extension(a)),
            lambda root, a=asked: (
                (found := root.longest_agreeing(a)) and (path_of(found.block), found.n_tokens)
            ),
            lambda root, f=first, n=last: [path_of(each) for each in root.children[f:n]],
            lambda root, f=first: [path_of(each) for each in root.children[f : f + 1]],
        ):
            many, few = families.do(question)
            assert many == few
        assert not isinstance(families.roots[1].family, Siblings)
        if isinstance(families.roots[0].family, Siblings):
            runs = families.roots[0].family.runs
            assert all(0 < len(run) < 2 * 2 for run in runs), "what is moved for one more or less"
            most = max(most, len(runs))
    assert most > 10


def test_an_index_beyond_the_last_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    families = Families(monkeypatch)
    for number in range(9):
        families.do(lambda root, n=number: root.add(block(root, (n,), SEALED)))
    many, few = families.do(lambda root: [path_of(root.children[n]) for n in (0, 5, 8, -1, -9)])
    assert many == few
    for index in (9, -10):
        with pytest.raises(IndexError):
            families.roots[0].children[index]
