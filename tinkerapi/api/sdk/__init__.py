"""The official tinker SDK's dialect: its bodies as ``training.types``, and results as its bodies.

``parse`` and ``render`` are a codec only: bytes in, values out, and back. They know no request, no
row and no engine. Each has protobuf and the JSON of older clients; what both forms of a request
must obey is in ``parse.calls`` and ``parse.tensors``. ``tinker_public_pb2`` is generated;
``tinker_public.proto`` says how.
"""
