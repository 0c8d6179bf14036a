"""Open trained models, evaluate them on the test images, and classify single images.

May import: the single modules, config, data, ranks, exchange, results, training.
"""
