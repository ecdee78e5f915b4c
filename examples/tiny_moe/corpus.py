"""The training text: CPython's standard library and its language reference, split by file, and a tokenizer for it."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MAX_POSITIONS = 2048

VALIDATION_SHARE = 25
"""One document in this many is held out."""

# Character tables are not language, and `_sysconfigdata` spells out the paths of the machine that built Python.
_LEFT_OUT_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "topics")


@dataclass(frozen=True)
class Document:
    """A named text; the name is stable across machines that have the same Python version."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document belongs to the validation split (decided by its name alone)."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "little") % VALIDATION_SHARE == 0


def read_documents() -> list[Document]:
    """Every source file of the standard library and every topic of the language reference, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [Document(f"topics/{name}", text) for name, text in topics.items()]
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _LEFT_OUT_DIRS.intersection(relative.parts) or path.name.startswith(_LEFT_OUT_PREFIXES):
            continue
        try:
            documents.append(Document(relative.as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a few old modules declare another encoding
    return sorted(documents, key=lambda document: document.name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` entries; any byte string round-trips. Id 0 ends a text, id 1 pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """All documents as one row of token ids, each one preceded by the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return np.concatenate([np.array([end, *encoding.ids], dtype=np.int64) for encoding in encodings])
