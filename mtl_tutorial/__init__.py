"""One Network, Many Losses: multi-task optimisation methods, each beside its paper's equations.

The rooms of the package, lowest first:

- ``gradients``: per-task gradients of shared parameters, Gram matrices, weighted backward passes.
- ``diagnostics``: conflict, balance and stationarity, as pure functions of a Gram matrix.
- ``methods``: how K task losses become one step; one file per paper.
- ``metrics``, ``benchmarks``: what is learnt, and how well.
- ``training``: the one loop that joins a benchmark and a method.
- ``results``, ``plots``: result files to tables and figures.
- ``cli``: the command ``mtl-tutorial``.

Importing the package alone imports none of them, so ``import mtl_tutorial`` stays instant.
"""

__version__ = "0.1.0"
