"""The ranks: how they join, agree, exchange what they learnt, and notice who is silent.

May import: the base modules, config.
"""
