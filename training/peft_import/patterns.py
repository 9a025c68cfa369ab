"""Which modules a peft configuration selects, by peft's rules, with bounded time.

A pattern is a stranger's regular expression: one of ``re`` can run for years, and the process that
runs it serves everybody. ``regex`` has the same syntax and a timeout.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeVar

import regex

from training.errors import InvalidRequest
from training.peft_import.config import CONFIG_NAME, PeftConfig

ALL_LINEAR = "all-linear"

SECONDS = 0.5
"""For all matches of one adapter; good patterns take milliseconds for a thousand modules."""

MAX_PATTERN = 4000
"""Characters of one pattern: compiling a long one takes long, and cannot be interrupted."""

T = TypeVar("T")


class Patterns:
    """The matches of one adapter's configuration, with one budget of time for all of them."""

    def __init__(self, config: PeftConfig) -> None:
        self._config = config
        self._deadline = time.monotonic() + SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def selects(self, module: str, *, is_head: bool) -> bool:
        """Whether the adapter has matrices for this linear layer.

        Args:
            is_head: Whether it is the output head, which ``all-linear`` leaves out.

        Raises:
            InvalidRequest: A pattern is no regular expression, or takes too long. (400)
        """
        config = self._config
        if self._is_named("exclude_modules", config.exclude_modules, module):
            return False
        target = config.target_modules
        if isinstance(target, str):
            if target.lower() == ALL_LINEAR:
                return not is_head
            return self._is_whole("target_modules", target, module)
        if module in target:  # a whole name, whatever its layer
            return True
        return self._is_named("target_modules", target, module) and self._is_in_layers(module)

    def rank(self, module: str) -> int:
        """The rank that the configuration gives to a module."""
        return self._first("rank_pattern", self._config.rank_pattern, module, self._config.rank)

    def alpha(self, module: str) -> float:
        """The alpha that the configuration gives to a module."""
        return self._first("alpha_pattern", self._config.alpha_pattern, module, self._config.alpha)

    def _is_named(self, field: str, names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self._is_whole(field, names, module)
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _is_whole(self, field: str, pattern: str, module: str) -> bool:
        return self._match(field, pattern, module, whole=True) is not None

    def _is_in_layers(self, module: str) -> bool:
        layers = self._config.layers
        if layers is None:
            return True
        for pattern in self._config.layers_patterns or (r"[^.]*",):
            match = self._match("layers_pattern", rf"(?:.*?\.)?{pattern}\.(?P<idx>\d+)\.", module)
            if match is not None:
                return int(match["idx"]) in layers
        return False

    def _first(self, field: str, values: Mapping[str, T], module: str, otherwise: T) -> T:
        for pattern, value in values.items():
            if self._match(field, rf"(.*\.)?({pattern})$", module) is not None:
                return value
        return otherwise

    def _match(
        self, field: str, pattern: str, module: str, *, whole: bool = False
    ) -> regex.Match[str] | None:
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                if len(pattern) > MAX_PATTERN:
                    raise InvalidRequest(
                        f"{CONFIG_NAME}: {field}: a pattern has more than {MAX_PATTERN} "
                        "characters; name the modules in a list"
                    )
                compiled = self._compiled[pattern] = regex.compile(pattern)
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            matches = compiled.fullmatch if whole else compiled.match
            return matches(module, timeout=left)
        except TimeoutError:
            raise InvalidRequest(
                f"{CONFIG_NAME}: {field}: its patterns take more than {SECONDS:g} s to match; "
                "name the modules in a list"
            ) from None
        except (regex.error, RecursionError, OverflowError) as error:
            raise InvalidRequest(
                f"{CONFIG_NAME}: {field}: not a regular expression: {str(error)[:100]}"
            ) from None
