"""Another budget, other quotas, while all goes on: at once if they are larger, else in steps.

What is in use cannot be taken back, so a budget that is to be smaller is, at every moment, what is
held, and never less than what it is to be: nothing that is given back is given out again. So is a
quota. Between two events:

    n_bytes == max(wanted, held by all)             and for each tenant (and a model's cap)
    quota   == max(min(limit, n_bytes), held)       limit: what the configuration says

A step evicts what has been unused for longest, of a tenant or a model that is beyond its limit
first, and gives free slots and empty arenas back; minima are kept (shares.py). When nothing more
can go, it waits for a lease, a pin or a session to end. An arena that was found (adopting.py) may
bring more than the budget: it is the same then.
"""

from kvd.core.budget import Budget
from kvd.core.cache import Cache, Limits
from kvd.core.events import Effect
from kvd.core.shares import ModelShare, Share, reclaimable
from kvd.core.tenants import Tenant

_NOBODY = Share(0)
"""Whom blocks go for: all minima stand against it."""
_STEPS_OF_A_BLOCK = 2


def reconfigure(cache: Cache, limits: Limits) -> None:
    """Let other limits be in effect from now on. Salts, minima, caps, and who is there, stay as
    they are; what is there already beyond a limit stays, too."""
    cache.limits = limits
    budget = cache.budget
    quotas = {rule.name: rule.quota for rule in limits.tenants}
    for tenant in budget.tenants.values():
        tenant.limit = quotas.get(tenant.name)
    budget.wanted = limits.max_memory
    settle(budget)


def settle(budget: Budget) -> None:
    """Set the budget, the quotas and the caps in effect by what is held now."""
    held = budget.n_bytes - budget.unassigned
    budget.n_bytes = max(budget.wanted, held)
    budget.unassigned = budget.n_bytes - held
    budget.is_over = _excess(budget) > 0
    for tenant in budget.tenants.values():
        tenant.settle(budget.n_bytes)
    for model in budget.models.values():
        model.settle()
    budget.is_over = budget.is_over or any(each.excess > 0 for each in _limited(budget))


def evictable(budget: Budget, whose: Tenant | ModelShare | None) -> int:
    """Bytes of one tenant or model, or (None) of all, that can go to make it smaller."""
    if whose is None:
        return reclaimable(budget.arenas.values(), _NOBODY)
    return reclaimable(whose.arenas, whose.share)


def can_go_on(budget: Budget) -> bool:
    """Whether there is a step to do: something is too much, and can go."""
    if not budget.is_over:
        return False
    if _excess(budget) > 0 and evictable(budget, None):
        return True
    return any(each.excess > 0 and evictable(budget, each) for each in _limited(budget))


def shrink_some(budget: Budget, most: int, effects: list[Effect]) -> None:
    """Give back what is too much, as far as it can go, of `most` blocks."""
    steps = most * _STEPS_OF_A_BLOCK
    for each in _limited(budget):
        if each.excess > 0:
            steps -= budget.reduce(each, each.share, each.excess, steps, effects)
    settle(budget)
    budget.reduce(budget, _NOBODY, _excess(budget), steps, effects)
    settle(budget)


def _excess(budget: Budget) -> int:
    """Bytes that are held and should not be: beyond the budget, or promised to others."""
    return budget.n_bytes - budget.wanted + budget.promised - budget.unassigned


def _limited(budget: Budget) -> list[Tenant | ModelShare]:
    """All that may have a limit of their own."""
    return [*budget.tenants.values(), *budget.models.values()]
