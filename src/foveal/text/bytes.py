"""A tokenizer without training: every byte is a token, as a `tokenizer.json` like any other.

Token i is the byte i for i in 0..255; 256 opens a document (`<|begin|>`) and 257 closes it
(`<|end|>`). Byte-level BPE (GPT-2, Radford et al. 2019) with no merges is exactly that: its
pre-tokenizer writes each byte as one printable character, and without merges each character
stays a token. So the bundled model's tokenizer needs no code of its own: `load_tokenizer` and
the `transformers` library both read the files written here.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from foveal.core.files import write_text

BEGIN, END = "<|begin|>", "<|end|>"
BEGIN_ID, END_ID = 256, 257
VOCAB_SIZE = 258


def write_byte_tokenizer(directory: Path | str) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`.

    Encoding with special tokens puts `<|begin|>` first and adds no end.
    """
    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (BEGIN, END)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, BEGIN_ID)],
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    write_text(Path(directory) / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(Path(directory) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable character of each byte, mapped to the byte: printable Latin-1 stands for
    itself, the other bytes in order for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(0x100 + i): byte for i, byte in enumerate(others)}
