"""The audit of a classifier: its loss over a data set, taken apart.

Rows become batches of probabilities with their measures (`rows`), each measure is a class with ``update``,
``merge`` and ``result``, and `state` puts them together.
"""
