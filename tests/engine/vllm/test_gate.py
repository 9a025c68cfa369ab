"""The turns of groups at the server."""

from __future__ import annotations

import asyncio

from training.engine.vllm.gate import FairGate


def test_a_late_group_does_not_wait_behind_all_of_an_earlier_one() -> None:
    order: list[str] = []

    async def visit(gate: FairGate, name: str, leave: asyncio.Event) -> None:
        async with gate.place(name[0]):
            order.append(name)
            await leave.wait()

    async def main() -> None:
        gate, leaves = FairGate(2), {}
        tasks = []
        for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2"):
            leaves[name] = asyncio.Event()
            tasks.append(asyncio.create_task(visit(gate, name, leaves[name])))
            await asyncio.sleep(0)
        for name in ("a1", "a2", "b1", "a3", "c1", "b2", "a4"):
            leaves[name].set()
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order == ["a1", "a2", "b1", "a3", "c1", "b2", "a4"]


def test_a_cancelled_visit_takes_no_place() -> None:
    async def main() -> list[str]:
        gate, order = FairGate(1), list[str]()

        async def visit(name: str) -> None:
            async with gate.place(name):
                order.append(name)
                await asyncio.sleep(0)

        async def hold(until: asyncio.Event) -> None:
            async with gate.place("first"):
                await until.wait()

        until = asyncio.Event()
        first = asyncio.create_task(hold(until))
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(visit("cancelled"))
        last = asyncio.create_task(visit("last"))
        await asyncio.sleep(0)
        until.set()
        cancelled.cancel()
        await asyncio.gather(first, last)
        await asyncio.gather(cancelled, return_exceptions=True)
        return order

    assert asyncio.run(main()) == ["last"]
