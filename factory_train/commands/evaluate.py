"""`evaluate RUN`: measure a checkpoint again, from the run directory alone."""

from __future__ import annotations

from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, integer, the_run
from factory_train.commands.summary import evaluation_lines, shown

_KEYS = ("step",)


def main(argv: list[str]) -> int:
    """Evaluates a checkpoint, prints the result, and returns 0.

    Raises:
        NotFoundError: no such run or checkpoint.
        IntegrityError: the checkpoint is damaged.
    """
    parser = ArgumentParser("evaluate", "Measures validation loss and bits per byte of a checkpoint.", "example: evaluate 7k2m9x step=400")
    add_words(parser, _KEYS)
    run, settings = the_run("evaluate", parser.parse(argv).words, _KEYS)
    step = integer("evaluate", "step", settings)

    from dataclasses import asdict

    from factory_train.evaluation.evaluate import evaluate_run, evaluation_path

    evaluation = evaluate_run(run, step)
    print("\n".join([f"{'run':<10}  {run.name}: {evaluation.checkpoint}", *evaluation_lines(asdict(evaluation))]))
    print(f"{'written':<10}  {shown(evaluation_path(run, evaluation.step))}")
    return 0
