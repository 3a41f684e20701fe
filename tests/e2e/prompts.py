"""Prompts as people send them, for the tests of exactness: chats that grow turn by turn, documents
that several ask about, code, other alphabets, emoji, and lengths from 1 to 3,000 tokens.

Each group begins with a token that no other one has, and within it each prompt shares as much with
the one before it as with any earlier one. So a context that has computed the one before and is cut
where they part has what a shared cache brings.
"""

# ruff: noqa: RUF001 - many alphabets are wanted here

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Tokenize = Callable[[str], Tokens]


class Prompt(NamedTuple):
    """`tokens` (int32 [n]), what it is called, and whether it goes on from the one before it."""

    name: str
    goes_on: bool
    tokens: Tokens


_TURNS = {
    "harbour": (
        ("Where is the lighthouse of the old harbour?", "On the cape, beyond the breakwater."),
        ("How do I get there on foot?", "Along the quay, and up the steps behind the fish market."),
        ("And when is it open?", "From May to October, ten to six, and never in a storm."),
        ("What does it cost?", "Three coins for grown-ups; children climb for nothing."),
        ("Thanks! What else should I see?", "The rope walk, and the whale bones in the chapel."),
        ("Which one first?", "The chapel: it closes at noon."),
    ),
    "backen": (
        ("Wie lange muss ein Hefeteig gehen?", "Etwa eine Stunde, bis er sich verdoppelt hat."),
        ("Und im Kühlschrank?", "Über Nacht, zugedeckt; danach eine halbe Stunde in der Küche."),
        ("Warum reißt die Kruste?", "Zu wenig Dampf, oder der Schnitt war nicht tief genug."),
        ("Größere Laibe?", "Länger backen, bei fünfzehn Grad weniger: 45 statt 35 Minuten."),
    ),
    "python": (
        ("Write a function that reverses a list.", "def reverse(items):\n    return items[::-1]"),
        ("Now in place.", "def reverse(items):\n    items.reverse()"),
        ("Without the method?", "i, j = 0, len(items) - 1\nwhile i < j:\n    ...  # swap them"),
        ("Is it O(n)?", "Yes: n / 2 swaps, and no memory beside two indices."),
    ),
    "料理": (
        ("味噌汁の作り方を教えてください。", "だしを取り、具を煮て、最後に味噌を溶きます。"),
        ("豆腐はいつ入れますか？", "味噌の直前です。🍲"),
        ("ありがとう！🙏", "どういたしまして。"),
    ),
}  # fmt: skip

_SYSTEM = (
    "You are the assistant of a small museum by the sea. Answer in one or two sentences. If you do "
    "not know something, say so, and name somebody who might. Never invent opening hours."
)

_STATUTE = (
    "Article {n}. Every member may see the accounts of the society at any time during its opening "
    "hours, take notes, and ask the treasurer in writing; the treasurer answers within {n} days. "
)
_LOG = (
    "2031-04-{n:02d}T07:{n:02d}:11Z node-{n} scheduler: moved shard {n} to rack B, 17 of 512 MiB "
    "left; retry in {n} s (cause: ENOSPC on /var/lib/queue)\n"
)
_QUESTIONS = {
    "statute": (
        _STATUTE,
        (
            "Who may see the accounts?",
            "Name the one who answers.",
            "How many days does the treasurer have by article 7?",
            "Summarise it in one sentence.",
            "Are notes allowed?",
        ),
    ),
    "log": (
        _LOG,
        (
            "Which node ran out of space first?",
            "Count the moves to rack B.",
            "Give the last time stamp.",
            "Explain ENOSPC.",
        ),
    ),
}

_ALONE = {
    "english": "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "german": "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Pflicht.",
    "russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая по-своему.",
    "greek": "Ἄνδρα μοι ἔννεπε, μοῦσα, πολύτροπον, ὃς μάλα πολλὰ πλάγχθη.",
    "chinese": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
    "korean": "나랏말싸미 듕귁에 달아 문자와로 서르 사맛디 아니할쎄",
    "arabic": "اقرأ الكتاب من أوله إلى آخره، ثم اكتب ما فهمت منه.",
    "hebrew": "בראשית היה הדבר, ואחר כך באו המילים.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "thai": "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกัน",
    "emoji": "👩‍🚀🚀🌍➡️🌕 👨‍👩‍👧‍👦🏳️‍🌈 🇩🇪🇯🇵🇧🇷 ☎️⌛🧂🪗",
    "emoji in text": "Tonight 🌧️, tomorrow ☀️; bring an ☂️ (or two ☂️☂️) & a 🧥!",
    "c": "static inline uint32_t rotl(uint32_t x, int r) { return x << r | x >> (32 - r); }\n",
    "sql": "SELECT k.id, count(*) FROM kv k JOIN blocks b USING (id) GROUP BY 1 ORDER BY 2 DESC;",
    "json": '{"a": [1, 2.5e-3, null, {"β": "\\u00e9", "nested": [[[]]]}], "ok": true}',
    "diff": "@@ -1,3 +1,3 @@\n-def f(x): return x\n+def f(x: int) -> int:\n+    return x\n",
    "blanks": "\t\t  \n\n   \r\n \u00a0\u2003.",
    "combined": "Z̸a̷l̶g̵o̴ t̸e̷x̶t̵ ａｎｄ ｗｉｄｅ, 𝔣𝔯𝔞𝔨𝔱𝔲𝔯, ﷽",
}  # fmt: skip

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 500, 513, 1025, 1536, 3000)
"""Tokens; around the length of a block, of a batch, and of windows."""


def prompts(tokenize: Tokenize, n_vocab: int) -> list[Prompt]:
    """All of them, group by group: at least 40. `tokenize` adds no begin token."""
    texts: list[tuple[str, bool, str]] = []
    for name, turns in _TURNS.items():
        text = f"{_SYSTEM}\n"
        for number, (question, answer) in enumerate(turns, 1):
            text += f"{name}> {question}\n"
            texts.append((f"{name} {number}", number > 1, text))
            text += f"{answer}\n"
    for name, (line, questions) in _QUESTIONS.items():
        document = "".join(line.format(n=n) for n in range(1, 9))
        for number, question in enumerate(questions, 1):
            texts.append((f"{name} {number}", number > 1, f"{document}\n{question}"))
    texts += [(name, False, f"{text} {text}") for name, text in _ALONE.items()]
    for length in LENGTHS:
        words = " ".join(f"{length + number * 7919 % 997}" for number in range(length))
        texts.append((f"{length} tokens", False, words))
    found: list[Prompt] = []
    first = n_vocab
    for name, goes_on, text in texts:
        first -= not goes_on
        length = int(name.split()[0]) if name.endswith(" tokens") else None
        tokens = np.append(np.int32(first), tokenize(text))[:length]
        assert len(tokens) == (length or len(tokens))
        found.append(Prompt(name, goes_on, tokens.astype(np.int32)))
    assert len({prompt.name for prompt in found}) == len(found) >= 40
    return found


def some(found: list[Prompt]) -> list[Prompt]:
    """A part of them that takes a few seconds with a real model: of each sort."""
    names = {
        "harbour 1", "harbour 2", "harbour 3", "log 1", "log 2", "chinese", "emoji", "c",
        "1 tokens", "33 tokens", "1025 tokens",
    }  # fmt: skip
    chosen = [prompt for prompt in found if prompt.name in names]
    assert len(chosen) == len(names)
    return chosen


def bytes_as_tokens(n_vocab: int) -> Tokenize:
    """For a model without a vocabulary: a token for each byte."""

    def tokenize(text: str) -> Tokens:
        raw = np.frombuffer(text.encode(), np.uint8)
        return (raw.astype(np.int32) * 31 + 7) % (n_vocab - 1) + 1

    return tokenize
