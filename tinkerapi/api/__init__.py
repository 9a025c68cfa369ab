"""HTTP: three dialects and their shared parts.

``quickref``, ``sdk`` and ``openai`` each parse and render on their own and do not import
each other. The modules here serve several dialects: authentication, request bodies, threads,
waiting, fields, errors. ``urls`` joins their routes.
"""
