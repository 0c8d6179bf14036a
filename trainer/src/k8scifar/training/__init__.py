"""The training loop and its parts; read loop.py first.

May import: the single modules, config, data, ranks, exchange, results.
"""
