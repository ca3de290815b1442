"""A reload that cannot be used changes nothing."""

from __future__ import annotations

import asyncio

import pytest

from gpuckpt.config import Settings
from gpuckpt.errors import BusyError
from gpuckpt.pool.config import Model, Pool
from gpuckpt.pool.hands import Found
from gpuckpt.pool.state import Golden
from gpuckpt.service.service import Service
from tests.pool_world import FakeHands, run


def test_a_model_gets_no_golden_of_one_that_goes() -> None:
    """It would adopt replicas that the other is about to stop, under their requests."""

    async def test() -> None:
        found = Found("g", Golden.TMPFS, 4, 1)
        hands = FakeHands(old=found, new=found)
        service = Service(Settings(), Pool(models={"old": Model(golden="g")}), hands=hands)
        await service.open()
        with pytest.raises(BusyError, match="new"):
            await service.reload(Pool(models={"new": Model(golden="g")}))
        assert list(service.owner.models) == list(service.config.models) == ["old"]
        assert not service.owner.models["old"].leaving
        # First without either, then with the new one.
        await service.reload(Pool())
        while service.owner.models:
            await asyncio.sleep(0.002)
        assert (await service.reload(Pool(models={"new": Model(golden="g")}))).added == ["new"]
        await service.close(0.1)

    run(test())
