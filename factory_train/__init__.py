"""factory_train: train language models on Slurm, Ray or one machine from Hydra-configured recipes."""

__version__ = "0.1.0"
