"""Requests about a prompt, from what callers have: explain and forget; and what a model's
fingerprint is made of, in words.

These belong to no session, so there is nothing here to keep: client.py and aio.py ask.
"""

from collections.abc import Mapping
from hashlib import blake2b

from kvd_client.state import Model, Tokens, pack_tokens
from kvd_proto.messages import MAX_TRAIT_NAME, MAX_TRAIT_TEXT, MAX_TRAITS, Explain, Forget

_MARK = 16
"""Hex digits for the end of a text that was cut, so that two which differ there stay different."""


def explain_message(model: Model | bytes, tokens: Tokens, tenant: str) -> Explain:
    """`model` is one that may be registered or not, or its arena fingerprint (32 bytes). Raises
    BadMessage for tokens that cannot be."""
    if not isinstance(model, Model):
        return Explain(model, pack_tokens(tokens), tenant, [])
    shape = (("payload_format", model.payload_format), ("block_tokens", str(model.block_tokens)))
    traits = [list(trait) for trait in (*model.traits[: MAX_TRAITS - len(shape)], *shape)]
    return Explain(model.arena_fingerprint, pack_tokens(tokens), tenant, traits)


def forget_message(model: Model | bytes, tokens: Tokens, tenant: str) -> Forget:
    """`model` is one that is registered, or its arena fingerprint (32 bytes). Raises BadMessage for
    tokens that cannot be."""
    fingerprint = model.arena_fingerprint if isinstance(model, Model) else model
    return Forget(fingerprint, pack_tokens(tokens), tenant)


def traits_of(fields: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Fields of a fingerprint as `Model.traits`, each as long as it may be."""
    rows = [(name[:MAX_TRAIT_NAME], _shortened(fields[name])) for name in sorted(fields)]
    return tuple(rows[:MAX_TRAITS])


def _shortened(text: str) -> str:
    if len(text) <= MAX_TRAIT_TEXT:
        return text
    mark = blake2b(text.encode("utf-8", "replace"), digest_size=_MARK // 2).hexdigest()
    return f"{text[: MAX_TRAIT_TEXT - _MARK - 5]} ... {mark}"
