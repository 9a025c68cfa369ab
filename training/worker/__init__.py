"""The worker: runs futures on an engine. One process per base model.

scheduler
    Decides which claimed futures run next; pure Python.
operations
    Turns futures into engine calls and engine results into outcomes.
adapter_cache
    Keeps adapters in memory, and rebuilds them from snapshot and log.
loop
    Claim, run, commit; sampling steps in between.
"""
