"""The training itself: the loop, and what it is made of; read loop.py first.

May import: the base modules, config, data, ranks, results.
"""
