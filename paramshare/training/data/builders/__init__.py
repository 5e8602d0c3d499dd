"""Sets of our own, as builders of tensorflow-datasets.

Their features are plain tensors, so that they are prepared without TensorFlow. The modules import tensorflow-datasets at their head:
import them where they are used.
"""
