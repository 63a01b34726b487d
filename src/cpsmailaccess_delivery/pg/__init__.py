"""The outbox on PostgreSQL: one that many machines feed, and many empty.

::

    backend      what `Outbox("postgresql://...")` is made of
    connections  to the server: kept, given back, left behind by a fork; its clock
    schema       tables, and how an older one becomes the present one
    engine       pgqueuer: which mail is next for whom
    functions    what the server does in one call: publish a commit, claim, give jobs
    transit      mails that come from another outbox
    mails        one mail and every change of it, as SQL
    lease        the claim on one mail: a token that every change must show
    leases       those of this process, kept alive
    workers      who delivers, on all hosts
    watch        what has changed, for who looks
    feed, feed_watch
                 the next mails, for who delivers, and the thread that leases them ahead
    lane_sharing whose a lane is: one worker's at a time
    vault, register, journal
                 accounts, and what happened
"""
