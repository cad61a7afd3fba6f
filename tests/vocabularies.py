"""Small tokenizers of every kind that checkpoints ship, trained on source text."""

import io
import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from foveal.text.bytes import write_byte_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
OTHER = "Größe naïve 東京 Привет 😀 🇫🇷 العربية\n"


def corpus() -> list[str]:
    lines: list[str] = []
    for module in (statistics, textwrap, json):
        lines += Path(module.__file__).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()] + [OTHER.strip()] * 3


def save(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def byte_level_bpe(directory: Path) -> None:
    """As GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    save(tokenizer, directory)


def metaspace_unigram(directory: Path) -> None:
    """As T5 and XLNet."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    save(tokenizer, directory)


def byte_fallback_bpe(directory: Path) -> None:
    """As the tokenizer.json of Llama 2, Mistral and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL + byte_pieces,
        limit_alphabet=80,
        show_progress=False,
    )
    tokenizer.train_from_iterator((line.replace(" ", "▁") for line in corpus()), trainer)
    # Byte pieces are ordinary entries of the vocabulary, not special ones.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    save(tokenizer, directory)


def wordpiece(directory: Path) -> None:
    """As BERT, whose decoder puts spaces between words by itself."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("def", normalized=False)])
    save(tokenizer, directory)


def sentencepiece_bpe(directory: Path) -> None:
    """As Llama 2's own tokenizer.model, with two added tokens."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=written,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    added = {
        "500": {"content": "<|tool|>", "special": True},
        "501": {"content": "<think>", "special": False},
    }
    config = {"tokenizer_class": "LlamaTokenizer", **NAMES, "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


JSON_KINDS: dict[str, Callable[[Path], None]] = {
    "bytes": write_byte_tokenizer,
    "byte-level-bpe": byte_level_bpe,
    "metaspace-unigram": metaspace_unigram,
    "byte-fallback-bpe": byte_fallback_bpe,
    "wordpiece": wordpiece,
}
KINDS = JSON_KINDS | {"sentencepiece": sentencepiece_bpe}
