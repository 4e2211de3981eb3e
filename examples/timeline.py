"""Where a request spent its time: prefill on one worker, the handoff of its KV, decode on another.

Run it beside a cluster: `phasewise serve`, then `python examples/timeline.py [HOST:PORT]`.
"""

from __future__ import annotations

import sys

import phasewise


def main(target: str = "127.0.0.1:50051") -> None:
    with phasewise.Client(target, timeout_s=120) as client:
        done = client.generate("The quick brown fox " * 20, max_tokens=8, temperature=0, timeline=True)
    start_s = done.timeline[0].at_unix_s
    for event in done.timeline:
        moved = f", {event.num_bytes:,} bytes" if event.num_bytes else ""
        print(f"{(event.at_unix_s - start_s) * 1e3:9.2f} ms  {event.stage:<14} {event.worker_id}{moved}")
    print("placed on:", done.placement)


if __name__ == "__main__":
    main(*sys.argv[1:])
