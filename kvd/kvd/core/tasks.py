"""Requests that take long, in steps between which others get their turn; whose blocks they mean.

A task is a generator: it checks what was asked and yields, and each step after that is sent the
effects of the event in which it is done. What it returns is the reply. Between two steps anything
may happen: blocks go, whole arenas go. What it is doing: explaining.py, forgetting.py.
"""

from collections.abc import Generator
from typing import Any

from kvd.core.budget import Budget
from kvd.core.cache import Cache, Task
from kvd.core.events import Effect
from kvd.core.sequences import Session
from kvd.core.tenants import Tenant
from kvd.core.tree import GONE, Block
from kvd_proto.errors import BadMessage, Forbidden, KvdError, TooMany

Steps = Generator[None, list[Effect], Any]

SESSION_TASKS = 4
"""Under way at once. The daemon keeps their tokens meanwhile."""


def begin(
    cache: Cache, session: Session, correlation: int, steps: Steps, effects: list[Effect]
) -> None:
    """Check what was asked (raises KvdError), and do the first step."""
    if session.tasks >= SESSION_TASKS:
        raise TooMany("this session has as many of these under way as it may", most=SESSION_TASKS)
    next(steps)
    session.tasks += 1
    cache.tasks.append(Task(session, correlation, steps))
    if len(cache.tasks) == 1 and not cache.budget.letting_go:
        work(cache, effects)


def work(cache: Cache, effects: list[Effect]) -> None:
    """Do a step of one of the tasks, which take turns. That of a session which has ended ends."""
    if not cache.tasks:
        return
    task = cache.tasks.popleft()
    session = task.session
    if not session.alive:
        session.tasks -= 1
        task.steps.close()
        return
    body: Any
    try:
        task.steps.send(effects)
    except StopIteration as stop:
        body = stop.value
    except KvdError as error:
        body = error
    else:
        cache.tasks.append(task)
        return
    session.tasks -= 1
    cache.reply(session, task.correlation, body, effects)


def find_tenant(budget: Budget, session: Session, name: str) -> Tenant:
    """The tenant that a request names (""): the session's own, or for an administrator any. Raises
    Forbidden, whether there is such a tenant or not, or BadMessage."""
    if name in ("", session.tenant.name):
        return session.tenant
    if not session.administrator:
        raise Forbidden("only the daemon's own user and root may name another tenant", asked=name)
    tenant = budget.tenants.get(name)
    if tenant is None:
        raise BadMessage(
            "there is no such tenant", asked=name, known=", ".join(sorted(budget.tenants))
        )
    return tenant


def alive(block: Block) -> Block:
    """The block, or if it has gone since the last step, the nearest above that has not. The root of
    an arena that has gone is alive, and has no children that are."""
    node = block
    while node.state is GONE:
        assert node.parent is not None
        node = node.parent
    return node
