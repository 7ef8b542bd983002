"""The mathematics of xent on tensors: no autograd, no files, no parsing of options.

Data flows one way: `scores` meet `targets`; a `sweep` visits tiles of rows × classes as large as the
`plan` allows; every tile feeds the row `statistics`; loss and gradient are read off the statistics.
`reference` is the same mathematics in its slowest and most obvious form.
"""
