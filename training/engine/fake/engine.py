"""An engine without a model: three roles that agree with each other and load no torch."""

from __future__ import annotations

from training.engine.fake.renderer import FakeRenderer
from training.engine.fake.sampler import FakeSampler
from training.engine.fake.trainer import BeforeVerb, FakeTrainer
from training.engine.interface import Engine, Renderer


def fake_engine(
    *,
    trainer: FakeTrainer | None = None,
    renderer: Renderer | None = None,
    max_context_tokens: int = 512,
    before_verb: BeforeVerb | None = None,
    adapter_bytes: int = 2**30,
) -> Engine:
    """The three fakes, two of which may be given."""
    trainer = trainer or FakeTrainer(max_context_tokens=max_context_tokens, before_verb=before_verb)
    return Engine(
        trainer=trainer,
        sampler=FakeSampler(trainer.info.max_context_tokens),
        adapter_bytes=adapter_bytes,
        renderer=renderer or FakeRenderer(),
    )
