"""A conversation in the terminal: the turns so far, and how the next answer is made and shown."""

from collections.abc import Iterator

from foveal.cli.answers import NOTES, show, summary
from foveal.core.errors import RequestError
from foveal.engine.llm import LLM, Prompt
from foveal.engine.request import Piece, SamplingParams
from foveal.text.chat import Message


class Conversation:
    """Keeps the history. With a chat template a turn is a message; raw, it is more text."""

    def __init__(
        self, llm: LLM, params: SamplingParams, *, raw: bool = False, system: str | None = None
    ) -> None:
        self._llm, self._params, self._raw = llm, params, raw
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []
        """The turns so far; raw, their contents follow one another as one text."""
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = list(self._opening)

    def turn(self, line: str) -> None:
        """Answer one line. Ctrl-C ends the answer, and what was said of it is kept; a turn that is
        refused is reported and forgotten."""
        self.messages.append({"role": "user", "content": line + "\n" if self._raw else line})
        try:
            pieces = self._llm.stream(self._prompt(), self._params)
        except RequestError as error:
            self.messages.pop()
            NOTES.print(f"{error}\n(turn dropped; /reset forgets the conversation)", markup=False)
            return
        self.messages.append({"role": "assistant", "content": self._listen(pieces)})

    def _prompt(self) -> Prompt:
        if self._raw:
            return "".join(message["content"] for message in self.messages)
        return self._llm.encode_chat(self.messages)

    def _listen(self, pieces: Iterator[Piece]) -> str:
        """Show an answer as it is made; gives its text, or as much as was made until Ctrl-C."""
        said, note = "", ""
        try:
            for piece in pieces:
                show(piece.text)
                said += piece.text
                if piece.completion is not None:
                    note = summary(piece.completion)
        except KeyboardInterrupt:
            note = "stopped by Ctrl-C"
        show("" if said.endswith("\n") else "\n")
        NOTES.print(note, style="dim", markup=False)
        return said
