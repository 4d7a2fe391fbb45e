"""`export RUN`: a checkpoint as a Hugging Face model folder, from the run directory alone."""

from __future__ import annotations

from pathlib import Path

from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, integer, the_run
from factory_train.commands.summary import shown
from factory_train.errors import ConfigError

_KEYS = ("step", "out", "dtype")
_DTYPES = ("float32", "bfloat16")


def main(argv: list[str]) -> int:
    """Exports a checkpoint, prints where it is, and returns 0.

    Raises:
        ConfigError: an unknown number format.
        NotFoundError: no such run or checkpoint.
        IntegrityError: the checkpoint is damaged.
    """
    parser = ArgumentParser(
        "export", "Writes a checkpoint in the layout transformers loads.", "example: export 7k2m9x out=my_model dtype=bfloat16"
    )
    add_words(parser, _KEYS)
    run, settings = the_run("export", parser.parse(argv).words, _KEYS)
    dtype = settings.get("dtype", _DTYPES[0])
    if dtype not in _DTYPES:
        raise ConfigError(f"'{dtype}' is not a number format for export", where="export dtype", fix=f"dtype={' or dtype='.join(_DTYPES)}")
    step, out = integer("export", "step", settings), settings.get("out")

    from factory_train.export import export_run

    folder = export_run(run, step=step, out=Path(out).expanduser().absolute() if out else None, dtype=dtype)
    print(f"export      {shown(folder)} (Hugging Face layout, {dtype})")
    print(f'load        transformers.AutoModelForCausalLM.from_pretrained("{shown(folder)}")')
    return 0
