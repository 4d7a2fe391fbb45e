"""`python -m factory_train`."""

from factory_train.cli import console_script

if __name__ == "__main__":
    console_script()
