"""`foveal chat`: turns, commands, interrupts, and models that cannot chat."""

import io

import pytest
from typer.testing import CliRunner

from foveal.cli.conversation import Conversation
from foveal.cli.main import app
from foveal.core.errors import RequestError
from foveal.engine.llm import LLM
from foveal.engine.request import SamplingParams
from tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("chatty")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    path = tmp_path_factory.mktemp("silent")
    write_tiny_model(path, chat=False)
    return path


def run(model, given: str, *options: str):
    options = ("--max-tokens", "4", "--temperature", "0", *options)
    return CliRunner().invoke(app, ["chat", "--model", str(model), *options], input=given)


def test_a_script_talks(model):
    result = run(model, "hi\n\nyou\n/reset\nhi\n/exit\nnever\n")
    assert result.exit_code == 0
    assert result.stderr.count("cut after 4 tokens") == 3
    first, again = (result.stdout.splitlines()[at] for at in (0, -1))
    assert first == again, "after /reset the same line gets the same answer"


def test_help(model):
    assert "/reset" in run(model, "/help\n").stderr


def test_history_is_what_the_template_sees(model):
    llm, params = LLM(model), SamplingParams(temperature=0, max_tokens=3)
    conversation = Conversation(llm, params)
    conversation.turn("hi")
    conversation.turn("you")
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    expected = llm.chat(conversation.messages[:3], params).text
    assert conversation.messages[3]["content"] == expected


def test_a_refused_turn_is_forgotten(model, capsys):
    conversation = Conversation(LLM(model), SamplingParams(temperature=0, max_tokens=3))
    conversation.turn("x" * 500)
    assert conversation.messages == []
    assert "got 521 tokens" in capsys.readouterr().err
    conversation.turn("hi")
    assert len(conversation.messages) == 2


class Interrupted(io.StringIO):
    """A terminal at which somebody presses Ctrl-C as the third piece comes."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes == 3:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupt_ends_the_answer_and_not_the_chat(model, monkeypatch, capsys):
    conversation = Conversation(LLM(model), SamplingParams(seed=0, max_tokens=60))
    terminal = Interrupted()
    monkeypatch.setattr("sys.stdout", terminal)
    conversation.turn("hi")
    kept = conversation.messages[1]["content"]
    assert terminal.getvalue() == (kept if kept.endswith("\n") else kept + "\n")
    assert "stopped by Ctrl-C" in capsys.readouterr().err
    conversation.turn("go on")
    assert len(conversation.messages) == 4


def test_without_a_template(silent):
    result = run(silent, "hi\n")
    assert isinstance(result.exception, RequestError)
    assert "--raw" in str(result.exception) and "chat_template.jinja" in str(result.exception)
    llm = LLM(silent)
    made = llm.generate("hi\n", SamplingParams(temperature=0, max_tokens=4))[0].text
    assert run(silent, "hi\n", "--raw").stdout == made + "\n"
    result = run(silent, "hi\n", "--raw", "--system", "Be brief.")
    assert isinstance(result.exception, RequestError)
