"""``make run`` and ``make demo``: the whole path on real mails, on this machine alone."""
