"""Sends hostile input of one kind, ten times a second. For benchmarks/gateway.py.

Prints a line when it begins, and at its end one of JSON: how often it was answered with what, and for clients that
leave when each did.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import grpc

from phasewise.rpc import phasewise_pb2 as pb

RATE = 10
_GENERATE = "/phasewise.v1.Inference/Generate"
_WRONG = (
    b'{"messages": ["hi"]}', b'{"prompt": {}}', b'{"prompt": [[1], "a"]}', b'{"messages": [{"role": {}}]}',
    b'{"prompt": "a", "logit_bias": {"%s": 1}}' % (b"9" * 5000), b"[1, 2", b"\xff\xfe", b'{"prompt": "\\ud800"}',
)  # fmt: skip


class Sender:
    """Answers are counted by their status."""

    def __init__(self, http: str, grpc_address: str) -> None:
        host, port = http.split(":")
        self._address = (host, int(port))
        self._channel = grpc.insecure_channel(grpc_address, [("grpc.max_send_message_length", -1)])
        self.answers: Counter[str] = Counter()
        self.left: dict[str, float] = {}

    def raw(self, data: bytes, *, hold_s: float = 0.0) -> None:
        """Sends bytes on a new connection, and reads the beginning of the answer; or holds it so long."""
        with socket.create_connection(self._address, timeout=60) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            if hold_s:
                time.sleep(hold_s)
                return
            try:
                self.answers[connection.recv(12)[9:12].decode() or "closed"] += 1
            except OSError as error:
                self.answers[type(error).__name__] += 1

    def post(self, path: str, content: bytes) -> None:
        self.raw(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)

    def leave(self) -> None:
        """A burst of clients that leave within some 10 ms."""
        connections = []
        for _ in range(20):
            name = f"left-{random.getrandbits(60)}"
            body = b'{"prompt": "x", "max_tokens": 2000, "ignore_eos": true, "stream": true}'
            head = f"POST /v1/completions HTTP/1.1\r\nx-request-id: {name}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection = socket.create_connection(self._address)
            connection.sendall(head.encode() + body)
            connections.append((name, connection))
        for name, connection in connections:
            time.sleep(random.uniform(0, 0.001))
            self.left[name] = time.monotonic()
            connection.close()

    def leave_grpc(self) -> None:
        """The same over gRPC."""
        calls = []
        for _ in range(20):
            name = f"left-{random.getrandbits(60)}"
            sampling = pb.Sampling(max_tokens=2000, ignore_eos=True)
            message = pb.GenerateRequest(text="x", request_id=name, sampling=sampling).SerializeToString()
            calls.append((name, self._channel.unary_stream(_GENERATE, lambda raw: raw, lambda raw: raw)(message)))
        for name, call in calls:
            time.sleep(random.uniform(0, 0.001))
            self.left[name] = time.monotonic()
            call.cancel()

    def call(self, message: bytes) -> None:
        call = self._channel.unary_stream(_GENERATE, lambda raw: raw, lambda raw: raw)
        try:
            for _ in call(message, timeout=60):
                self.answers["message"] += 1
        except grpc.RpcError as error:
            self.answers[error.code().name] += 1


def action_of(kind: str, sender: Sender, max_bytes: int) -> Callable[[], None]:
    """What one request of a kind does: a table of the kinds, longer than other functions may be.

    Sizes are cut to the largest body that is accepted at all. Raises ValueError for an unknown kind.
    """
    size = max_bytes - 4096
    words = b"hello world " * (min(5_160_000, size) // 12)
    ids = b",".join([b"17"] * (size // 3))
    completions, random_bytes = "/v1/completions", random.Random(0)
    if kind.startswith("words"):
        text = b"hello world " * (min(int(kind[6]) * 1_032_000, size) // 12)
        return lambda: sender.post(completions, b'{"max_tokens": 1, "prompt": "%s"}' % text)
    if kind == "letter_16mib":
        return lambda: sender.post(completions, b'{"max_tokens": 1, "prompt": "%s"}' % (b"a" * size))
    if kind == "messages_16mib":
        body = b'{"max_tokens": 1, "messages": [{"role": "user", "content": "%s"}]}' % (b"ab " * (size // 3))
        return lambda: sender.post("/v1/chat/completions", body)
    if kind == "tokenize_16mib":
        return lambda: sender.post("/tokenize", b'{"prompt": "%s"}' % (b"word " * (size // 5)))
    if kind == "ids_16mib":
        return lambda: sender.post(completions, b'{"max_tokens": 1, "prompt": [%s]}' % ids)
    if kind == "detokenize_16mib":
        return lambda: sender.post("/detokenize", b'{"tokens": [%s]}' % ids)
    if kind == "many_messages":
        messages = b",".join([b'{"role": "user", "content": ""}'] * (size // 32))
        return lambda: sender.post("/v1/chat/completions", b'{"max_tokens": 1, "messages": [%s]}' % messages)
    if kind == "small_messages":  # of the largest body that is read on the loop
        messages = b",".join([b'{"role": "user", "content": ""}'] * 2000)
        return lambda: sender.post("/v1/chat/completions", b'{"max_tokens": 1, "messages": [%s]}' % messages)
    if kind == "prompt_lists":
        prompts = b",".join([b"[1]"] * (size // 4))
        return lambda: sender.post(completions, b'{"max_tokens": 1, "prompt": [%s]}' % prompts)
    if kind == "stop_ids":
        return lambda: sender.post(completions, b'{"prompt": "a", "stop_token_ids": [%s]}' % ids)
    if kind == "pipelined":
        return lambda: sender.raw(b"GET /health HTTP/1.1\r\n\r\n" * 50_000)
    if kind == "nested_1mb":
        return lambda: sender.post(completions, b'{"prompt": %s' % (b"[" * min(1_000_000, size)))
    if kind == "digits_1mb":
        return lambda: sender.post(completions, b'{"prompt": "a", "seed": %s}' % (b"9" * min(1_000_000, size)))
    if kind == "wrong_shapes":
        return lambda: [sender.post("/v1/chat/completions", body) for body in _WRONG] and None
    if kind == "endless_header":
        return lambda: sender.raw(b"GET /health HTTP/1.1\r\nA: " + b"a" * (20 << 20))
    if kind == "half_body":
        return lambda: sender.raw(b"POST /tokenize HTTP/1.1\r\nContent-Length: 100000\r\n\r\n{", hold_s=3.0)
    if kind == "silent":
        return lambda: sender.raw(b"", hold_s=3.0)
    if kind == "leaves":
        return sender.leave
    if kind == "grpc_words_5mb":
        message = pb.GenerateRequest(text=words.decode(), sampling=pb.Sampling(max_tokens=1)).SerializeToString()
        return lambda: sender.call(message)
    if kind == "grpc_ids_16mib":
        token_ids = pb.TokenIds(ids=[17] * size)
        message = pb.GenerateRequest(token_ids=token_ids, sampling=pb.Sampling(max_tokens=1)).SerializeToString()
        return lambda: sender.call(message)
    if kind == "grpc_messages":
        message = pb.GenerateRequest(messages=pb.ChatMessages.FromString(b"\x0a\x00" * (size // 2))).SerializeToString()
        return lambda: sender.call(message)
    if kind == "grpc_small_messages":
        message = pb.GenerateRequest(messages=pb.ChatMessages.FromString(b"\x0a\x00" * 32_000)).SerializeToString()
        return lambda: sender.call(message)
    if kind == "grpc_leaves":
        return sender.leave_grpc
    if kind == "grpc_malformed":
        return lambda: sender.call(random_bytes.randbytes(200))
    raise ValueError(kind)


def main(kind: str, http: str, grpc_address: str, max_bytes: int, seconds: float) -> None:
    os.nice(10)  # the reader of the streams shares this core
    sender = Sender(http, grpc_address)
    act = action_of(kind, sender, max_bytes)
    print("begins", flush=True)
    threads = []
    begin_s = time.monotonic()
    for i in range(int(seconds * RATE)):
        time.sleep(max(0.0, begin_s + i / RATE - time.monotonic()))
        if sum(thread.is_alive() for thread in threads) < 50:
            threads.append(threading.Thread(target=act))
            threads[-1].start()
    for thread in threads:
        thread.join(60)
    result = {"sent": len(threads), "answers": dict(sender.answers), "took_s": time.monotonic() - begin_s}
    print(json.dumps({**result, **({"left": sender.left} if sender.left else {})}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
