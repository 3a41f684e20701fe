"""What the journal is told of sequences. The journal itself: journal.py."""

from kvd.core.cache import Cache
from kvd.core.sequences import Sequence
from kvd_proto.happenings import Kind


def note_alloc(cache: Cache, sequence: Sequence, n_tokens: int, n_blocks: int) -> None:
    """A sequence got its id; so much of its prompt of `n_tokens` was cached as its length says."""
    context, journal = sequence.context, cache.budget.journal
    session = context.session
    tenant, model, hit = session.tenant.name, context.arena.name, sequence.length
    who = (session.client, session.pid, context.number, sequence.seq_id)
    told = (sequence.generation, sequence.request, n_tokens, hit)
    journal.note_frequent(Kind.ALLOC, tenant, model, *who, *told)
    if hit:
        journal.note_frequent(Kind.HIT, tenant, model, *who, n_tokens, hit, n_blocks)


def note_release(cache: Cache, sequence: Sequence, failed: bool) -> None:
    """Its owner gives it back."""
    context = sequence.context
    session = context.session
    cache.budget.journal.note_frequent(
        Kind.RELEASE,
        session.tenant.name,
        context.arena.name,
        session.client,
        session.pid,
        context.number,
        sequence.seq_id,
        sequence.generation,
        sequence.length,
        "failed" if failed else "completed",
    )


def note_timed_out(cache: Cache, sequence: Sequence, now: float) -> None:
    """Nobody has used it for too long."""
    context = sequence.context
    session = context.session
    cache.budget.journal.note(
        Kind.TIMED_OUT,
        session.tenant.name,
        context.arena.name,
        session.client,
        session.pid,
        context.number,
        sequence.seq_id,
        sequence.generation,
        sequence.request,
        round(now - sequence.touched, 3),
    )
