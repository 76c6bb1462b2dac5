"""Where papers and code differ on the methods with a quadratic program, and what is done here."""

FILE = "tests/methods/test_qp.py::"

DEVIATIONS = [
    {
        "method": "mgda",
        "paper": "exact min-norm point",
        "official": "250 steps of Frank-Wolfe or gradient projection, vertices cut to .999/.001, "
        "iterations never counted",
        "torchjd": "Frank-Wolfe, stops at steps of 1e-3 or after 100",
        "libmtl": "the official solver, iterations counted",
        "ours": "exact, block principal pivoting",
        "test": FILE + "test_torchjd_mgda_stops_early",
    },
    {
        "method": "mgda",
        "paper": "no normalisers",
        "official": "weights found for normalised gradients are applied to the raw losses",
        "torchjd": "no normalisers",
        "libmtl": "weights are applied to the normalised gradients",
        "ours": "applied to the normalised gradients, scaled to sum one; combine='raw' switches",
        "test": FILE + "test_mgda_raw_combination_can_raise_a_loss_which_the_default_does_not",
    },
    {
        "method": "upgrad",
        "paper": "exact projections on the dual cone",
        "official": "TorchJD is the authors' library",
        "torchjd": "1e-4 of the trace on the diagonal; trace below 1e-4 counts as zero",
        "libmtl": "",
        "ours": "exact at every scale",
        "test": FILE + "test_upgrad_scales_with_small_gradients",
    },
    {
        "method": "dualproj",
        "paper": "exact projection of the mean gradient on the dual cone",
        "official": "",
        "torchjd": "1e-4 of the trace on the diagonal, so the step can conflict",
        "libmtl": "",
        "ours": "exact at every scale",
        "test": FILE + "test_a_ridge_makes_projections_conflict",
    },
    {
        "method": "cagrad",
        "paper": "no rescaling of the step",
        "official": "divides by 1 + c^2 in the trainers; by 1 + c in the fast variant",
        "torchjd": "no rescaling",
        "libmtl": "divides by 1 + c^2",
        "ours": "no rescaling; setting rescale",
        "test": FILE + "test_cagrad_rescale_and_one_task",
    },
    {
        "method": "cagrad",
        "paper": "undefined where the dual weights give a zero gradient",
        "official": "adds a step of rounding noise, up to c times the mean gradient's length",
        "torchjd": "zero there, and for every Jacobian of squared norm below 1e-4",
        "libmtl": "as the official code",
        "ours": "the maximiser nearest to the mean gradient",
        "test": FILE + "test_cagrad_at_stationary_points",
    },
    {
        "method": "nash_mtl",
        "paper": "the solution of G alpha = 1 / alpha",
        "official": "at most 20 convex programs from the last alpha; far off for unequal or small "
        "gradients",
        "torchjd": "the official code; raises for one task and for zero gradients",
        "libmtl": "",
        "ours": "damped Newton to rounding error; one task keeps its gradient",
        "test": FILE + "test_nash_length_and_invariance",
    },
    {
        "method": "fairgrad",
        "paper": "",
        "official": "least squares from 1/K, step times K, shared gradients clipped to norm one",
        "torchjd": "the same least squares, not converged for small gradients",
        "libmtl": "",
        "ours": "damped Newton at every scale; neither factor nor clipping",
        "test": FILE + "test_torchjd_fairgrad_leaves_small_gradients_unsolved",
    },
    {
        "method": "sdmgrad",
        "paper": "three independent batches per step; weights moved by stochastic gradient steps",
        "official": "20 steps of size 10, momentum .5; one repository aliases the three batches",
        "torchjd": "weighting only, steps of size 10",
        "libmtl": "steps of size 5",
        "ours": "one batch, exact weights, no state",
        "test": FILE + "test_sdmgrad_weights_and_limits",
    },
]
