"""What narrow weights cost, measured on the bundled model."""

import json

import pytest
import torch
from typer.testing import CliRunner

from foveal.bench.weights import distance
from foveal.cli.main import app
from foveal.models.bundled import bundled_model
from foveal.models.load import load_model


def test_a_model_is_at_no_distance_from_itself() -> None:
    model = load_model(bundled_model(), dtype=torch.float32)
    passage = list(b"def main():\n    return 0\n")
    found = distance(model, model, [passage, passage])
    assert found.surprise.shape == (2 * (len(passage) - 1),)
    assert found.divergence.max() == 0
    assert found.agrees.all()
    with torch.inference_mode():
        logits = model(torch.tensor([passage[:-1]]))[0].double()
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(passage[1:]))
    assert found.values["text_bits"] == pytest.approx(nats.item() / 0.6931471805599453, rel=1e-5)


def test_divergence_is_that_of_the_formula() -> None:
    reference = load_model(bundled_model(), dtype=torch.float32)
    coarse = load_model(bundled_model(), weights="int4")
    passage = list(b"import os\nimport sys\n")
    found = distance(reference, coarse, [passage])
    with torch.inference_mode():
        p, q = (
            m(torch.tensor([passage[:-1]]))[0].double().softmax(-1) for m in (reference, coarse)
        )
    exact = (p * (p / q).log2()).sum(-1)
    torch.testing.assert_close(found.divergence.double(), exact, rtol=1e-3, atol=1e-5)
    assert found.values["KL to float32"] > 1e-4


def test_command() -> None:
    arguments = ["bench", "weights", "--formats", "int8,int4-16", "--tokens", "128", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["subject"]["weights"] for one in found] == ["float32", "int8", "int4-16"]
    bits = [one["values"]["of_a_weight_bits"] for one in found]
    assert bits[0] == 32
    assert bits[0] > bits[1] > 8 > bits[2] > 4
    assert found[0]["values"]["KL to float32"] == 0 < found[1]["values"]["KL to float32"]
    assert all(one["values"]["decoded_per_s"] > 0 for one in found)


def test_unknown_format_is_refused_before_anything_is_measured() -> None:
    result = CliRunner().invoke(app, ["bench", "weights", "--formats", "bf16,int5"])
    assert "weights: got 'int5'" in str(result.exception)
