"""What running LibMTL's release 1.1.5 beside this package showed, beyond the other lists."""

PARITY = "tests/methods/test_libmtl_parity.py::"

DEVIATIONS = [
    {
        "method": "gradvac",
        "topic": "when a target cosine moves",
        "paper": "",
        "official": "",
        "torchjd": "",
        "libmtl": "only where a gradient was corrected: after agreeing gradients it stays at zero",
        "ours": "at every step, as a running mean",
        "test": PARITY + "test_gradvac_differs_in_when_targets_move",
    },
    {
        "method": "mgda",
        "topic": "large gradients",
        "paper": "",
        "official": "",
        "torchjd": "",
        "libmtl": "fails where no two gradients have a min-norm point of norm below 10,000",
        "ours": "no bound",
        "test": PARITY + "test_mgda_takes_no_large_gradients",
    },
    {
        "method": "cagrad",
        "topic": "small gradients",
        "paper": "the step scales with the gradients",
        "official": "1e-8 under the roots, which decides where squared gradients are as small",
        "torchjd": "a step of zero for gradients below 0.01",
        "libmtl": "as the official code; this release takes three tasks alone",
        "ours": "the step scales with the gradients",
        "test": PARITY + "test_cagrad_differs_for_small_gradients",
    },
]
