"""The conversation behind `phasewise chat`: lines in, answers streamed out, a history that stays consistent."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cli.errors import did_you_mean, one_line
from phasewise.core.errors import ServingError

if TYPE_CHECKING:
    from phasewise.client import Client
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
        self.messages: list[dict[str, str]] = []
        self._reset()

    def run(self) -> None:
        """Raises ServingError for a failed answer when nobody sits at the terminal to read of it and go on."""
        if self._is_interactive:
            # Importing it is what gives input() line editing and recall.
            import readline  # noqa: F401

            self._note(f"{self._greeting}; /help for help")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._turn(line)

    def _read(self) -> str | None:
        """The next line, stripped; "" after a Ctrl-C at the prompt; None at the end."""
        try:
            if self._is_interactive:
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            self._note("")
            return None
        except KeyboardInterrupt:
            self._note("")
            return ""

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
        try:
            with self._client.chat(self.messages, stream=True, **self._options) as stream:
                for delta in stream:
                    parts.append(delta.text)
                    print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except ServingError as error:
            self._end_turn("".join(parts))
            if not self._is_interactive:
                raise
            self._note(f"phasewise: {one_line(error.message)}")
            return
        print(flush=True)
        self._end_turn("".join(parts))

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
