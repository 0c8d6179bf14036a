"""The ranks: how they join, agree, exchange what they learnt, and notice who is silent.

May import: the single modules, config.
"""
