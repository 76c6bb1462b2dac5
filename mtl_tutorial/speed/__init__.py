"""What a step costs: ours, equal weighting, TorchJD and LibMTL side by side in one run.

`cases` holds the networks, `contenders` the steps that compete on them, `steps` times them in turn,
`memory` takes their peaks in fresh processes, `accuracy` compares what they compute with float64,
`solver_times` times the K x K solvers alone, and `report` runs, stores and prints them all. The
command is ``mtl-tutorial speed``.

What makes the comparison fair:

* Each case has a process of its own, as training has: memory that one case freed would make the
  next one's large allocations cheaper.
* In every round the order of the contenders is drawn anew, and each runs once untimed right before
  its timed steps, so that nobody inherits another's caches. Quick steps are timed several times in
  a turn. Figures are medians of ratios to equal weighting in the same round.
* Equal weighting takes part twice. The ratio of the two (A/A) is the noise; where it is off by more
  than 5%, the case is marked noisy.
* Peers run at their default and at the best of their settings, which the same run finds and names.
* Two of the cases were chosen before anything was measured on them, and nothing is tuned on them.
"""
