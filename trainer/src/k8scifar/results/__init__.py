"""What a run leaves behind and shows: its folder, TensorBoard, progress, summary, report.

May import: the single modules, config, data.
"""
