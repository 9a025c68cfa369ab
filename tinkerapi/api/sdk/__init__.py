"""The official tinker SDK's dialect: its bodies to ``training.types``, and results to its bodies.

``parse`` and ``render`` are only a codec: bytes to values and back. They use no requests, rows
or engine. Each has protobuf and the JSON of older clients; checks that both forms of a request
share are in ``parse.calls`` and ``parse.tensors``. ``tinker_public_pb2`` is generated;
``tinker_public.proto`` says how.
"""
