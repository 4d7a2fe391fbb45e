"""The writer process with a pause before every step, so that a test can catch it at work."""

import time

from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.writer import main

PAUSE_S = 0.02

if __name__ == "__main__":
    main(DurableFiles(lambda when, action, path: time.sleep(PAUSE_S)))
