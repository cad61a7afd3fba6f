"""A tiny random Llama over bytes, saved as transformers saves it, for tests that generate text."""

import json
from pathlib import Path

import torch
import transformers as hf

from foveal.text.bytes import BEGIN_ID, END_ID, VOCAB_SIZE, write_byte_tokenizer

CONTEXT = 192
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tiny_model(directory: Path, *, chat: bool = True, seed: int = 0) -> None:
    """Weights are drawn wide, so that greedy decoding never meets near-ties."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=None,
    )
    rng = torch.Generator().manual_seed(seed)
    model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    model.generation_config = hf.GenerationConfig(eos_token_id=END_ID, bos_token_id=BEGIN_ID)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)
    if chat:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT}))
