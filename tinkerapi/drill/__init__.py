"""The crash drill: the same training twice, once with kills, compared bit by bit.

model
    A transformer of a few thousand parameters, made for the drill.
job
    The training: requests, fixed by a seed before the server starts.
clients
    Send the requests as real clients do: repeatedly, under the same key, until there is an answer.
server
    ``manage.py up`` in a scratch folder, and its child processes.
kills
    The plan of kills, also fixed by the seed, and the thread that carries it out.
moments
    The worst moments for a kill, and how to detect them from outside.
evidence
    The state that a run leaves, and the differences between two runs.
report
    The table.

It uses the server from outside only: HTTP, processes, files and rows.
"""
