"""Sends events to the operator's receiver: each is a row until the receiver has taken it.

A process of its own (``manage.py webhook``, a part of ``up``) notices, stores and sends. Nothing
else waits for it, so a receiver that is slow or dead slows only its own events. What it must not
lose is in Postgres; a restart continues with the rows.
"""
