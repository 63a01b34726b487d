"""Witnesses: databases that know, after a crash, whether a transaction has committed.

`zodb` and `sql`, each beside the database that it needs; see `ITransactionWitness`.
"""
