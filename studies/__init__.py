"""Experiments: networks trained with PDP and with other pruning methods. See README.md.

`python -m studies.train_image --help` and the other modules with a command line list their
arguments.
"""
