"""The solvers of ``SoftmaxRegression``, a file each."""
