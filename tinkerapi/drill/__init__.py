"""The crash drill: the same training twice, once with kills, and not one bit of difference.

model
    A transformer of a few thousand parameters to train on, made on the spot.
job
    What is trained: requests, fixed by a seed before anything is started.
clients
    Send them as real clients do: again, under the same name, until there is an answer.
server
    ``manage.py up`` in a scratch folder, and the processes below it.
kills
    When whom to kill, fixed by the seed too, and the thread that does it.
moments
    When a kill hurts most, and how that is told from outside.
evidence
    What a run left behind, and how two of them differ.
report
    The table.

It knows the server from outside: HTTP, processes, files and rows.
"""
