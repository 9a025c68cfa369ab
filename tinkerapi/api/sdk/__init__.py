"""The official tinker SDK's dialect: its bodies as ``training.types``, and results as its bodies.

Codec only: bytes in, values out, and back. It knows no request, no row and no engine. Protobuf
forms are in ``requests`` and ``responses``, the JSON of older clients in ``json_requests`` and
``json_responses``; what both forms of a request must obey is in ``calls`` and ``tensors``.
``tinker_public_pb2`` is generated; ``tinker_public.proto`` says how.
"""
