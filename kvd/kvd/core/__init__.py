"""The cache's rules, pure: events in, effects out. No sockets, clock, randomness or memory maps.

machine.py     one mutator: takes an event, returns effects
events.py      what can happen, and what the shell is asked to do
tree.py        blocks and the prefix tree: exact and token-exact matches
siblings.py    the children of a block that has thousands
arenas.py      the slots and the tree of one model
budget.py      leases over ancestors, making room
dropping.py    how blocks go, and what is told of each that does
eviction.py    which block goes next: the policy, and LRU, tail-first
tenants.py     what each tenant may take, holds, and would give up first
sequences.py   sessions, contexts, sequence ids and generations
deadlines.py   whose time is over when
commits.py     storing blocks: dedup in flight, sealing, failing
cache.py       all state in one place
models.py      registering models, opening and closing contexts
allocating.py  alloc, get, release; waiting for an id
storing.py     append and flush
pins.py        who keeps which block without a lease, and where the directory says so
pinning.py     pin and unpin
adopting.py    what an earlier daemon left, from records to blocks
checking.py    its bytes against their checksums, before they are served
accounting.py  the totals, what must add up, and reports
recount.py     the slow recount that the totals must agree with, in steps
"""
