"""A model that can be asked for text: its weights, its tokenizer, and where its text ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from factory_train import storage
from factory_train.checkpoint.format import MANIFEST_NAME
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.checkpoint.reference import find, split
from factory_train.data.manifest import TOKENIZER_NAME, DataManifest
from factory_train.data.tokenizer import Tokenizer
from factory_train.distributed.box import Box
from factory_train.distributed.process_group import choose_device
from factory_train.errors import ConfigError, IntegrityError
from factory_train.evaluation.evaluate import load_model, run_config
from factory_train.models.build import build_model
from factory_train.models.generate import continuation
from factory_train.models.hf_folder import HfFolder
from factory_train.models.language_model import LanguageModel
from factory_train.run_dir import RunDir
from factory_train.runs_index import find_run

# What stands in decoded text for bytes that are no character, or not yet.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TextModel:
    """A language model with its tokenizer, in one process.

    Args:
        device: of the model.
        notes: one line for each newer checkpoint that was passed over.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    notes: tuple[str, ...] = ()

    @staticmethod
    def open(text: str, root: Path) -> TextModel:
        """Loads what `text` names: RUN (its newest checkpoint that verifies), RUN@STEP, a checkpoint's folder, or an exported folder.

        Args:
            root: folder of all runs.

        Raises:
            NotFoundError: there is no such run or checkpoint.
            IntegrityError: what is stored is not what was written.
            ConfigError: it names several runs, or a model that this version does not know.
        """
        folder = Path(text)
        if (folder / "config.json").is_file():
            return _from_export(folder)
        word, step = split(text)
        if step is None and not (folder / MANIFEST_NAME).is_file():
            run = find_run(word, root)
            return _from_checkpoint(run, open_checkpoint(run))
        found = find(text, root)
        if found.run is None:
            what = "this checkpoint lies outside of its run, which has the tokenizer and the configuration"
            raise ConfigError(what, where=str(found.path), fix="RUN@STEP, or an exported folder")
        reader = CheckpointReader(found.path)
        reader.verify(sections=("weights",))
        return _from_checkpoint(found.run, reader)

    def continuation(self, prompt: str, num_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Iterator[str]:
        """Yields the text that follows a prompt, in pieces that each end with a whole character.

        Args:
            prompt: what goes before; "" stands for the end of another document.
            num_tokens: how many tokens to add, at most; an end-of-text ends it earlier and is not shown.
            temperature, top_p: see `models.generate.continuation`.
            seed: of the sampling.

        Raises:
            DataError: a character that the tokenizer does not have.
            ConfigError: an empty prompt, and the tokenizer has no end-of-text to start from.
        """
        eos_id = self.tokenizer.eos_id
        tokens = self.tokenizer.encode(prompt) or ([] if eos_id is None else [eos_id])
        if not tokens:
            raise ConfigError("the prompt is empty, and the tokenizer has no end-of-text to start from", fix="give it a prompt")
        generator = torch.Generator(self.device).manual_seed(seed)
        added: list[int] = []
        shown = 0
        for token in continuation(self.model, tokens, num_tokens, eos_id=eos_id, temperature=temperature, top_p=top_p, generator=generator):
            added.append(token)
            text = self.tokenizer.decode(added)
            # The next byte may complete what looks broken now.
            if not text.endswith(_REPLACEMENT):
                yield text[shown:]
                shown = len(text)
        yield self.tokenizer.decode(added)[shown:]


def _from_checkpoint(run: RunDir, reader: CheckpointReader) -> TextModel:
    with reader:
        cfg, manifest = run_config(run), DataManifest.load(run.data)
        device = choose_device(cfg.hardware.device, 0)
        model = load_model(cfg, manifest, reader, device)
    return TextModel(model, Tokenizer.load(run.data / TOKENIZER_NAME, manifest.eos_id), device, reader.notes)


def _from_export(folder: Path) -> TextModel:
    _verify_export(folder)
    source, device = HfFolder.open(folder), choose_device("auto", 0)
    assert source.model.vocab_size is not None
    with torch.device("meta"):
        model = build_model(source.model, source.model.vocab_size)
    model.to_empty(device=device)
    model.init_buffers(device)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source.check_holds(shapes)
    source.fill([(name, Box.whole(shapes[name]), parameter) for name, parameter in model.named_parameters()])
    eos_id = storage.read_json(folder / "config.json")["eos_token_id"]
    return TextModel(model.eval(), Tokenizer.load(folder / "tokenizer.json", eos_id), device)


def _verify_export(folder: Path) -> None:
    """Compares every file of an exported folder with the sha256 that `export` recorded."""
    path, again = folder / "manifest.json", "export the run again"
    try:
        recorded = storage.read_json(path)
        expected = None if recorded is None else dict(recorded["sha256"])
    except (ValueError, KeyError, TypeError):
        raise IntegrityError("the export is damaged: not a manifest", where=str(path), fix=again) from None
    if expected is None:
        # Its tokenizer could be of a kind that this version reads wrongly.
        fix = "a folder written by python -m factory_train export RUN"
        raise ConfigError("not exported by factory_train: no manifest.json in it", where=str(folder), fix=fix)
    for name, sha256 in expected.items():
        if not (folder / name).is_file():
            raise IntegrityError("the export is damaged: the file is missing", where=str(folder / name), fix=again)
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise IntegrityError("the export is damaged: its sha256 is not the manifest's", where=str(folder / name), fix=again)
