"""Which adapters fit into a worker's memory, and which leave first."""

from __future__ import annotations

import pytest

from training.errors import OutOfMemory
from training.worker.adapter_memory import AdapterMemory


class Clock:
    """Each look is a second later."""

    seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.fixture
def memory() -> AdapterMemory:
    """100 bytes, of which ``a``, ``b`` and ``c`` of one lane each take 20, 30 and 40."""
    memory = AdapterMemory(100, clock=Clock())
    for name, size in (("a", 20), ("b", 30), ("c", 40)):
        memory.hold(name, size, lane_id=f"lane {name}")
    return memory


def test_what_fits_is_what_is_left_of_the_budget(memory: AdapterMemory) -> None:
    assert (memory.held_bytes, len(memory)) == (90, 3)
    assert memory.fits(10)
    assert not memory.fits(11)
    memory.release("b")
    memory.release("b")
    assert memory.fits(40)


def test_an_adapter_held_again_counts_once(memory: AdapterMemory) -> None:
    memory.hold("a", 25, lane_id="lane a")
    assert memory.held_bytes == 95


def test_the_least_recently_used_leaves_first(memory: AdapterMemory) -> None:
    memory.use("a", lane_id="lane a")
    assert memory.in_order_of_leaving(set()) == ["b", "c", "a"]


def test_those_whose_client_has_left_go_before_all_others(memory: AdapterMemory) -> None:
    assert memory.in_order_of_leaving({"lane c"}) == ["c", "a", "b"]
    memory.use("c", lane_id="another client's")
    assert memory.in_order_of_leaving({"lane c"}) == ["a", "b", "c"]


def test_what_could_never_fit_is_refused_with_the_sizes_and_the_setting() -> None:
    memory = AdapterMemory(2**30)
    memory.check(2**30)
    with pytest.raises(
        OutOfMemory, match=r"takes 1\.5 GiB, .* may take 1 GiB .*ADAPTER_CACHE_BYTES"
    ):
        memory.check(3 * 2**29)
