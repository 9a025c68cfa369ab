"""Where the folders of checkpoints and snapshots are kept, and the one interface to them.

A folder is written once, under a name that was never used, and never changed. The row in Postgres
that names it is the commit: a crash before it leaves a folder that no row refers to, never a row
without its folder. ``interface`` says what a storage does, ``data_folder`` keeps folders below the
data folder, and ``chosen`` gives the storage of the settings.

Not kept here, because it belongs to one machine: logs, the embedded Postgres, locks, crash logs,
base models, and the bodies of requests while they arrive. Requests with their images and results
are rows in Postgres.
"""
