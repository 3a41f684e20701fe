"""Metrics for Prometheus, whether the daemon is well, and a page to look at; over HTTP, off unless
asked for.

    listening    where: a Unix socket, loopback, a socket that systemd has passed
    http         one thread that answers GET, whatever anybody sends
    questions    what that thread asks the loop, and how the answers come back
    snapshot     what the loop answers: the state of one moment
    exposition   a snapshot as Prometheus' text
    history      the last hour, in samples
    service      which path answers what
    page.html    the page; it draws /history.json

Nothing here counts anything: that is done where it happens, all the time. It runs in a thread of
its own, so that the loop does nothing for it but to say how things are.
"""
