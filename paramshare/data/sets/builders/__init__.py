"""Builders of tensorflow-datasets for the library's own data sets.

Their features are plain tensors, so that they are prepared without TensorFlow. These modules import
tensorflow-datasets when they are imported: import them where they are used.
"""
