"""Where papers and code differ on the loss-balancing methods, and what is done here."""

FILE = "tests/methods/test_loss.py::"

DEVIATIONS = [
    {
        "method": "rlw",
        "paper": "softmax of standard normal numbers, drawn at every step",
        "official": "",
        "torchjd": "the same, from the global generator of the device",
        "libmtl": "the same",
        "ours": "own seeded generator on the host, part of the checkpoint",
        "test": FILE + "test_rlw_draws_anew_at_each_step_and_the_same_for_a_seed",
    },
    {
        "method": "uncertainty",
        "paper": "",
        "official": "",
        "torchjd": "L / (2 e^s) + s / 2 for every task; s is a parameter of the caller's optimiser",
        "libmtl": "the same form; s starts at -0.5",
        "ours": "the same form; s starts at 0, own gradient step, kept within a bound",
        "test": FILE + "test_uncertainty_equals_torchjd_over_steps",
    },
    {
        "method": "dwa",
        "paper": "ratio of the mean losses of the last two epochs, T = 2, weights sum to K",
        "official": "means over epochs; divides by zero where an older mean is zero",
        "torchjd": "as the official code; all weights NaN where an older and newer mean are zero",
        "libmtl": "as the official code",
        "ours": "means over epochs; a ratio without meaning counts as one",
        "test": FILE + "test_dwa_zero_mean_counts_as_standing_still_where_torchjd_gives_nan",
    },
    {
        "method": "geometric",
        "paper": "geometric mean of the losses",
        "official": "",
        "torchjd": "rejects negative losses; NaN gradient where a loss is zero",
        "libmtl": "NaN gradient where a loss is zero; reported weights are not the gradient's",
        "ours": "losses below 1e-8 count as 1e-8; the weights reported are the gradient's",
        "test": FILE + "test_geometric_loss_of_zero_stays_finite_where_torchjd_gives_nan",
    },
    {
        "method": "scale_invariant",
        "paper": "sum of log losses",
        "official": "no guard: a loss of zero gives infinity, a negative one NaN",
        "torchjd": "",
        "libmtl": "",
        "ours": "losses below 1e-8 count as 1e-8",
        "test": FILE + "test_odd_losses_and_gradients_give_finite_steps",
    },
    {
        "method": "slaw",
        "paper": "weights inverse to gradient norms, which are read from the spread of the losses",
        "official": "arithmetic means for 1 / (1 - beta) steps, then exponential ones; "
        "old weights kept where a variance rounds below zero",
        "torchjd": "",
        "libmtl": "",
        "ours": "the official statistics, with the deviation updated itself, never below zero",
        "test": FILE + "test_slaw_statistics_are_means_of_losses_and_squares",
    },
    {
        "method": "famo",
        "paper": "decay 0.001 (0.01 on Cityscapes), written outside of Adam",
        "official": "decay through Adam, 1e-5 by default; shared gradients clipped to norm one",
        "torchjd": "decay through Adam, 1e-3 by default; a loss below its bound is climbed",
        "libmtl": "decay through Adam, 1e-3 by default",
        "ours": "decay through Adam, 1e-3; no clipping; losses below their bound count as at it",
        "test": FILE + "test_famo_loss_below_its_bound_counts_as_at_it_where_torchjd_ascends",
    },
    {
        "method": "group_dro",
        "paper": "q sums to one",
        "official": "as ExcessMTL's baseline: q sums to K, updated before the backward pass",
        "torchjd": "",
        "libmtl": "",
        "ours": "sum one, updated before the backward pass, in logarithms; no size adjustment",
        "test": FILE + "test_group_dro_does_not_overflow_and_zero_step_is_equal_weighting",
    },
    {
        "method": "stch",
        "paper": "mu log sum exp of the weighted distances to the ideal point",
        "official": "log losses in a warm-up, then K mu log sum exp of log(L / nadir)",
        "torchjd": "the paper's form",
        "libmtl": "the official form",
        "ours": "the paper's form; the official one with warmup=4",
        "test": FILE + "test_stch_warm_up_trains_logs_and_measures_in_its_last_epoch",
    },
    {
        "method": "gradnorm",
        "paper": "norms at the last shared layer; sum K; first losses, or log of classes",
        "official": "",
        "torchjd": "",
        "libmtl": "softmax weights moved by the model's optimiser, epoch 0 as first losses, "
        "whole trunk, heads unweighted",
        "ours": "norms of all shared parameters, or of the last ones; plain gradient steps; "
        "weights stay positive; heads weighted",
        "test": FILE + "test_gradnorm_known_step",
    },
]
