"""The writer process with a pause before every step, so that a test can catch it at work.

It waits as long as there is a file at the path in the environment variable HOLD_WRITER.
"""

import os
import time

from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.writer import main

PAUSE_S = 0.02


def pause(*step: object) -> None:
    time.sleep(PAUSE_S)
    while os.path.exists(os.environ.get("HOLD_WRITER", "")):
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(DurableFiles(pause))
