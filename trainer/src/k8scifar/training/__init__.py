"""The training itself: the loop, and what it is made of; read loop.py first.

May import: the single modules, config, data, ranks, exchange, results.
"""
