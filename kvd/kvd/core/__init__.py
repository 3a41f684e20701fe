"""The cache's rules, pure: events in, effects out. No sockets, clock, randomness or memory maps.

machine.py     one mutator: takes an event, returns effects
events.py      what can happen, and what the shell is asked to do
tree.py        blocks and the prefix tree: exact and token-exact matches
budget.py      arenas' slots, leases over ancestors, tail-first LRU, making room
sequences.py   contexts, sequence ids and generations, waiting for an id
commits.py     storing blocks: dedup in flight, sealing, failing
accounting.py  the identities, as code: running totals against a slow recount
"""
