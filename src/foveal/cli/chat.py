"""`foveal chat`: talk with a model, turn by turn."""

import sys
from typing import Annotated

import typer

from foveal.cli import sampling
from foveal.core.errors import RequestError

_HELP = """/reset  forget the conversation
/help   this list
/exit   leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: sampling.Model = None,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: the model continues what you write.")
    ] = False,
    max_tokens: sampling.MaxTokens = 512,
    temperature: sampling.Temperature = 0.8,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    seed: sampling.Seed = None,
    stop: sampling.Stop = None,
    dtype: sampling.Dtype = None,
    weights: sampling.Weights = None,
    device: sampling.Device = "cpu",
    backend: sampling.Backend = "auto",
) -> None:
    """Talk with a model; it remembers the conversation. /help lists what can be typed.

    Each line of standard input is one turn, so that a script can talk, too. The bundled model
    was not trained to chat and continues what you write, as --raw does.

    Example: foveal chat --model path/to/a/chat/model --system "Be brief."
    """
    from foveal.cli import answers
    from foveal.cli.conversation import Conversation
    from foveal.engine.llm import LLM
    from foveal.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )
    with answers.loading(model):
        llm = LLM(model, dtype=dtype, weights=weights, device=device, backend=backend)
    if not llm.chat_template and not raw and model is not None:
        raise RequestError(
            f"{llm.directory}: no chat template, so the model was probably not trained to chat. "
            "Use a chat-tuned checkpoint, put its chat_template.jinja into this directory, or "
            "let the model continue what you write: foveal chat --raw"
        )
    raw = raw or not llm.chat_template
    if raw and system is not None:
        raise RequestError("--system: got a text; accepted: none, where there is no chat template")
    conversation = Conversation(llm, params, raw=raw, system=system)
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` line editing and a history)

        how = "It continues what you write." if raw else "It answers."
        answers.NOTES.print(f"{llm.directory.name}. {how} /help for help.", style="dim")
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
            case "/help":
                answers.NOTES.print(_HELP)
            case _:
                conversation.turn(line)


def _read_line() -> str | None:
    """The next line, without its end; None where the input ends. Ctrl-C drops what was typed."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    while True:
        try:
            return input("› ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
