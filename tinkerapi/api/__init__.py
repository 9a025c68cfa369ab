"""HTTP: three dialects over one floor.

``quickref``, ``sdk`` and ``openai`` each parse and render in a room of their own and do not know
each other. What several need lies under all of them: who asks, how a body arrives, threads,
waiting, fields, errors. ``urls`` puts their addresses together.
"""
