"""The conversation behind `phasewise chat`: lines in, answers streamed out, a history that stays consistent."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from cli.errors import did_you_mean, one_line
from cli.interrupts import on_interrupt
from phasewise.core.errors import ServingError

if TYPE_CHECKING:
    from phasewise.client import Client, Stream
    from phasewise.options import Options

HELP = """/reset  forget the conversation
/quit   leave (also Ctrl-D)
/help   show this
Ctrl-C  stop the answer that is being written"""


class ChatRepl:
    """Reads lines from stdin until its end or /quit.

    The history holds whole turns only. A stopped answer stays in it as far as it came; a turn without an answer is
    taken back. Prompts, notes and errors go to stderr, so a redirected stdout holds the answers alone.
    """

    def __init__(self, client: Client, options: Options, *, system: str | None, greeting: str) -> None:
        self._client = client
        self._options = options
        self._system = system
        self._greeting = greeting
        self._is_interactive = sys.stdin.isatty()
        self._is_reading = False
        self.messages: list[dict[str, str]] = []
        self._reset()

    def run(self) -> None:
        """Raises ServingError for a failed answer when nobody sits at the terminal to read of it and go on."""
        if self._is_interactive:
            # Importing it is what gives input() line editing and recall.
            import readline  # noqa: F401

            self._note(f"{self._greeting}; /help for help")
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGINT, previous)

    def _loop(self) -> None:
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:  # the line that was being typed is dropped
                self._note("")
                continue
            if line is None or (line.startswith("/") and not self._command(line)):
                return
            if line and not line.startswith("/"):
                self._turn(line)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C outside of an answer: it raises once per line that is being read, and means nothing elsewhere."""
        if self._is_reading:
            self._is_reading = False
            raise KeyboardInterrupt

    def _read(self) -> str | None:
        """The next line, stripped; None at the end. Raises KeyboardInterrupt."""
        self._is_reading = True
        try:
            if self._is_interactive:
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            self._note("")
            return None
        finally:
            self._is_reading = False

    def _command(self, line: str) -> bool:
        """Carries out a / command; False when it ends the conversation."""
        if line == "/quit":
            return False
        if line == "/reset":
            self._reset()
            self._note("the conversation starts anew")
        elif line == "/help":
            self._note(HELP)
        else:
            known = ("/reset", "/quit", "/help")
            self._note(f"no command {line!r}{did_you_mean(line, known)}; commands: {', '.join(known)}")
        return True

    def _turn(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        streams: list[Stream] = []
        failure = None

        def stop() -> None:
            for stream in streams:
                stream.close()

        with on_interrupt(stop) as interrupt:
            try:
                streams.append(self._client.chat(self.messages, stream=True, **self._options))
                if interrupt.came:  # before there was anything to close
                    streams[0].close()
                with streams[0] as stream:
                    for delta in stream:
                        parts.append(delta.text)
                        print(delta.text, end="", flush=True)
            except ServingError as error:
                failure = error
        self._end_turn("".join(parts))
        if interrupt.came:
            self._note("\n(stopped)")
        elif failure is None:
            print(flush=True)
        elif self._is_interactive:
            line_end = "\n" if parts else ""
            self._note(f"{line_end}phasewise: {one_line(failure.message)}")
        else:
            raise failure

    def _end_turn(self, answer: str) -> None:
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    @staticmethod
    def _note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
