"""Label noise: how much, where, and that nothing clean is touched."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_tutorial import benchmarks
from mtl_tutorial.noise import LabelNoise, parse_noise


@given(
    n=st.integers(1, 300),
    fraction=st.floats(0, 1),
    classes=st.integers(2, 12),
    seed=st.integers(0, 9),
)
def test_exactly_the_chosen_examples_can_change(n, fraction, classes, seed):
    noise = LabelNoise("a", fraction)
    labels = torch.arange(n) % classes
    noisy = noise.apply(labels, classes, seed, epoch=0)
    chosen = noise.chosen(n, seed)
    assert len(chosen) == len(set(chosen.tolist())) == int(fraction * n)
    rest = torch.ones(n, dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(noisy[rest], labels[rest])
    assert noisy.min() >= 0
    assert noisy.max() < classes
    assert torch.equal(labels, torch.arange(n) % classes)  # the clean labels are left alone


def test_labels_are_uniform_with_the_true_one_among_them():
    labels = torch.zeros(20_000, dtype=torch.int64)
    noisy = LabelNoise("a", 0.5).apply(labels, 10, seed=0, epoch=0)
    shares = torch.bincount(noisy[noisy > 0], minlength=10)[1:] / 10_000
    assert shares.sub(0.1).abs().max() < 0.015
    assert abs((noisy != 0).double().mean() - 0.5 * 0.9) < 0.01


def test_redrawn_noise_changes_with_the_epoch_and_fixed_noise_does_not():
    labels = torch.zeros(1000, dtype=torch.int64)
    for redraw in (True, False):
        noise = LabelNoise("a", 0.4, redraw)
        first, second = (noise.apply(labels, 10, 3, epoch) for epoch in (0, 1))
        assert torch.equal(first, second) != redraw
        assert torch.equal(first, noise.apply(labels, 10, 3, 0))
        assert not torch.equal(noise.chosen(1000, 3), noise.chosen(1000, 4))


def test_dense_labels_change_at_every_pixel_of_a_chosen_map():
    labels = torch.zeros(10, 8, 8, dtype=torch.int64)
    noisy = LabelNoise("a", 0.5).apply(labels, 13, 0, 0)
    changed = (noisy != 0).flatten(1).double().mean(1)
    assert ((changed == 0) | (changed > 0.7)).all()
    assert (changed > 0).sum() == 5


def test_text_round_trip_and_errors():
    for text in ("left:0.4", "left:0.25:fixed"):
        assert parse_noise(text).label == text
    for bad in ("left", "left:x", ":0.4", "left:0.4:often", "left:1.5", "left:-0.1"):
        with pytest.raises(ValueError, match="expected"):
            parse_noise(bad)


def test_a_benchmark_with_noise_shares_everything_else():
    clean = benchmarks.create("multidigits").prepare(torch.device("cpu"))
    noisy = clean.with_noise(LabelNoise("right", 0.3), seed=1, epoch=0)
    before, after = clean.data["train"], noisy.data["train"]
    assert after.inputs is before.inputs
    assert after.targets[0] is before.targets[0]
    wrong = (after.targets[1] != before.targets[1]).double().mean()
    assert abs(wrong - 0.3 * 0.9) < 0.03
    for split in ("val", "test"):
        assert noisy.data[split] is clean.data[split]
    with pytest.raises(ValueError, match="did you mean right"):
        clean.with_noise(LabelNoise("righ", 0.3), 0, 0)
    with pytest.raises(ValueError, match="classification"):
        benchmarks.create("toy").noisy_task(LabelNoise("objective 1", 0.3))


def test_fraction_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="0 to 1"):
        dataclasses.replace(LabelNoise("a", 0.5), fraction=2.0)
