"""A plugin for tests of packing: data sources of documents from one character to several rows long, and of single letters."""

from __future__ import annotations

import random
import string

from factory_train.config import DataConfig
from factory_train.data.source import Document, Source, divide
from factory_train.registries import DATA_SOURCES

NUM_DOCUMENTS = 400


@DATA_SOURCES.register("stories")
def stories(cfg: DataConfig) -> Source:
    """Sentences about numbers; every document begins with its own."""
    rng, documents = random.Random(0), []
    for number in range(NUM_DOCUMENTS):
        sentences = int(rng.expovariate(1.0))
        text = f"{number}" + "".join(f" and {number * factor} is {factor} times {number}" for factor in range(sentences))
        # Some are as short as documents get.
        documents.append(Document(f"story-{number}", text[:1] if number % 20 == 0 else text))
    return divide("stories about numbers", documents, cfg.validation_fraction)


@DATA_SOURCES.register("letters")
def letters(cfg: DataConfig) -> Source:
    """Documents of one character each."""
    return divide("letters", [Document(letter, letter) for letter in string.ascii_lowercase], cfg.validation_fraction)
