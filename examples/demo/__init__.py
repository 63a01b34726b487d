"""``make run``: the whole path on real mails, on this machine alone."""
