"""kill -9, again and again: two processors and four committing processes on one spool.

::

    committers --commit, abort, roll back, cancel, keys--> spool --processors--> relay
        |                                                                 drops, 4xx, 421, slow;
        +-- truth/: what was committed, in one write                  writes down what it has said

    killer: SIGKILL to one of them at a random moment, a look at the spool, and another begins

The spool is a directory, or a PostgreSQL that is killed now and then, too: all of it, or one of its
processes.

At the end everything is compared: see `verdict`.  ``python -m soak`` with tests/ on the path.
"""
