"""The versions of weights in a sampler of this process, and their numbers of jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from training.errors import InvalidRequest

W = TypeVar("W")
"""A version's weights: tensors, or bytes for the fake."""


@dataclass(eq=False)
class _Version(Generic[W]):
    weights: W
    num_jobs: int = 0
    is_retired: bool = False


class Versions(Generic[W]):
    """Published versions, and retired ones until their last job has ended."""

    def __init__(self) -> None:
        self._held: dict[str, _Version[W]] = {}

    @property
    def num_jobs(self) -> Mapping[str, int]:
        """Each held version, with its number of jobs."""
        return {name: version.num_jobs for name, version in self._held.items()}

    def publish(self, name: str, load: Callable[[], W]) -> None:
        """Hold the result of ``load``, unless a version of this name is held already."""
        if name not in self._held:
            self._held[name] = _Version(load())
        self._held[name].is_retired = False

    def weights(self, name: str) -> W:
        """The weights of a held version."""
        return self._held[name].weights

    def retire(self, name: str) -> None:
        """Drop a version as soon as no job uses it."""
        if name in self._held:
            self._held[name].is_retired = True
            self._forget_if_over(name)

    def begin_job(self, name: str | None) -> W | None:
        """The weights for one more job of a version; those of the base model are None.

        Raises:
            InvalidRequest: It is not published.
        """
        if name is None:
            return None
        version = self._held.get(name)
        if version is None or version.is_retired:
            raise InvalidRequest(f"No version of weights is published as {name}.")
        version.num_jobs += 1
        return version.weights

    def end_job(self, name: str | None) -> None:
        """Record that a job of a version has ended, with any outcome."""
        if name is not None:
            self._held[name].num_jobs -= 1
            self._forget_if_over(name)

    def _forget_if_over(self, name: str) -> None:
        version = self._held[name]
        if version.is_retired and not version.num_jobs:
            del self._held[name]
