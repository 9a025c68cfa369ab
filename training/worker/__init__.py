"""The worker side: where a row and a tensor meet. One process per base model.

scheduler
    Decides what runs next; pure Python over what was claimed.
operations
    Turns futures into engine calls and engine answers into outcomes.
adapter_cache
    Which adapters are in memory, and how one is rebuilt from snapshot and log.
loop
    Claim, run, commit; sampling steps in between.
"""
