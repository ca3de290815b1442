"""An engine of vLLM is told to give its caches back and to take them again: what becomes of requests, and of caches.

Runs in the server's environment: ``python tests/contract/vllm_engine.py MODEL FILE``; the file gets what was found, as
JSON. On processors vLLM has no memory that could be given back; its workers here give back nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

LONG, OTHER = [list(range(begin, begin + 300)) for begin in (5, 55)]


class Extension:
    """Of the workers."""

    def gpuckpt_release_caches(self) -> dict[str, Any]:
        return {"bytes": 7}

    def gpuckpt_take_caches(self) -> dict[str, Any]:
        return {"seconds": 0.5}

    def gpuckpt_quiet(self) -> dict[str, Any]:
        return {"closed": 0}


async def look(model: str) -> dict[str, Any]:
    from gpuckpt_guest.vllm_control import Orders
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            enforce_eager=True,
            load_format="safetensors",
            max_model_len=512,
            worker_extension_cls="vllm_engine.Extension",
        )
    )
    engine.vllm_config.model_config.enable_sleep_mode = True  # for those who look here; the engine has none
    orders = Orders(engine).handlers()
    number = 0

    async def ask(prompt: list[int], begun: asyncio.Event | None = None) -> dict[str, Any]:
        """What is answered, and how much of the prompt was in the cache."""
        nonlocal number
        number += 1
        sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        last: Any = None
        async for last in engine.generate({"prompt_token_ids": prompt}, sampling, f"request-{number}"):  # noqa: B007
            if begun:
                begun.set()
        return {"tokens": list(last.outputs[0].token_ids), "cached": last.num_cached_tokens}

    async def order(do: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = await orders[do]({"do": do} | more, [])
        return found

    try:
        found: dict[str, Any] = {"first": await ask(LONG), "again": await ask(LONG), "other": await ask(OTHER)}
        begun = asyncio.Event()
        running = asyncio.create_task(ask(OTHER, begun))
        await begun.wait()
        found["slept"] = await order("sleep", caches=1)
        found["running"] = await running
        waiting = asyncio.create_task(ask(LONG))
        found["asleep"] = await order("state")
        await asyncio.wait([waiting], timeout=2)
        found["waited"] = not waiting.done()
        found["woken"] = await order("wake", caches=1)
        found["waiting"] = await waiting
        found["awake"] = await order("state")
        found["after"] = await ask(LONG)
        return found
    finally:
        engine.shutdown()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(look(sys.argv[1]))))
