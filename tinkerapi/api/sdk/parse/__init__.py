"""The SDK's bodies, protobuf and JSON, as ``training.types``."""
