"""One answer, whole, and the same again from its seed.

Run it beside a cluster: `phasewise serve`, then `python examples/complete.py [HOST:PORT]`.
"""

from __future__ import annotations

import sys

import phasewise


def main(target: str = "127.0.0.1:50051") -> None:
    with phasewise.Client(target, timeout_s=120) as client:
        print("served:", client.model().name)
        first = client.generate("Once upon a time", max_tokens=24, temperature=0.8, seed=7)
        again = client.generate("Once upon a time", max_tokens=24, temperature=0.8, seed=7)
        print(first.text)
        print("the same from the same seed:", first.token_ids == again.token_ids)
        print(first.usage)


if __name__ == "__main__":
    main(*sys.argv[1:])
