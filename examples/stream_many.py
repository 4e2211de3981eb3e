"""Many chats at once on one connection, streamed; the slow ones are cancelled by leaving them.

Run it beside a cluster: `phasewise serve`, then `python examples/stream_many.py [HOST:PORT]`.
"""

from __future__ import annotations

import asyncio
import sys

import phasewise

QUESTIONS = ("What is the capital of France?", "Name three rivers.", "Why is the sky blue?", "Count to five.")


async def ask(client: phasewise.AsyncClient, question: str) -> str:
    """The answer, or its first 80 characters: leaving the block cancels the rest on the server."""
    answer = ""
    async with client.chat([{"role": "user", "content": question}], stream=True, max_tokens=64) as stream:
        async for delta in stream:
            answer += delta.text
            if len(answer) >= 80:
                break
    return answer


async def run(target: str) -> None:
    async with phasewise.AsyncClient(target, timeout_s=120) as client:
        for question, answer in zip(QUESTIONS, await asyncio.gather(*(ask(client, q) for q in QUESTIONS)), strict=True):
            print(f"{question}\n    {answer!r}")


def main(target: str = "127.0.0.1:50051") -> None:
    asyncio.run(run(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
