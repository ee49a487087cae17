"""pixseq: pretrain generative models on pixels, as composable command-line stages."""

__version__ = "0.1.0"
