"""An adapter in peft's format, read without torch: what it is, or why it cannot be imported.

The web process refuses most unsuitable files here, before a worker is asked. The worker, which
knows the base model, checks the rest (``training.engine.torch.peft_import``).
"""
