"""MultiDigits: splits without a shared digit, exact overlays, right labels, fair batches."""

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from mtl_tutorial.benchmarks import Data, MultiDigits, Protocol, create
from mtl_tutorial.benchmarks.multidigits import SIDE, SPLITS, overlay


@pytest.fixture(scope="module")
def bench():
    return create("multidigits").prepare(torch.device("cpu"))


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)


def test_shapes_ranges_and_labels(bench):
    assert list(bench.data) == ["train", "val", "test"]
    for name, (_, pairs) in SPLITS.items():
        split = bench.data[name]
        assert split.inputs.shape == (pairs, 1, SIDE, SIDE)
        assert split.inputs.dtype == torch.float32
        assert split.inputs.min() == 0
        assert split.inputs.max() == 1
        for target in split.targets:
            assert target.shape == (pairs,)
            assert sorted(set(target.tolist())) == list(range(10))


def test_data_are_the_same_on_every_load(bench):
    again = MultiDigits().prepare(torch.device("cpu"))
    torch.manual_seed(99)
    other = MultiDigits().prepare(torch.device("cpu"))
    assert bench.checksums() == again.checksums() == other.checksums()
    assert len(set(bench.checksums().values())) == 3


def test_checksum_sees_values_labels_shape_and_type():
    data = Data(torch.zeros(4, 2), (torch.zeros(4, dtype=torch.int64),))
    others = [
        Data(torch.zeros(4, 2).index_fill(0, torch.tensor([1]), 1.0), data.targets),
        Data(torch.zeros(2, 4), data.targets),
        Data(torch.zeros(4, 2, dtype=torch.int32), data.targets),
        Data(data.inputs, (torch.tensor([0, 0, 0, 1]),)),
    ]
    assert len({d.checksum() for d in (data, *others)}) == 5
    assert data.checksum() == Data(torch.zeros(4, 2), (torch.zeros(4).long(),)).checksum()


def test_no_digit_lies_in_two_splits(bench, digits):
    """From the pixels, not from the code: every split's images need digits of its own."""
    pixels, labels = digits
    seen: dict[str, set[int]] = {}
    for name in SPLITS:
        split = bench.data[name]
        used: set[int] = set()
        for corner, target in (("left", split.targets[0]), ("right", split.targets[1])):
            images = split.inputs[:, 0]
            # The edge rows and columns that the other digit does not touch identify a digit.
            if corner == "left":
                view, source = images[:, :8, :8], pixels
                mask = torch.ones(8, 8, dtype=torch.bool)
                mask[2:, 2:] = False
            else:
                view, source = images[:, 2:, 2:], pixels
                mask = torch.ones(8, 8, dtype=torch.bool)
                mask[:6, :6] = False
            rows = {}
            for i, key in enumerate(map(tuple, source[:, mask].tolist())):
                rows.setdefault((key, int(labels[i])), []).append(i)
            for image, key, label in zip(
                view, map(tuple, view[:, mask].tolist()), target.tolist(), strict=True
            ):
                fits = [i for i in rows[key, label] if (pixels[i] <= image + 1e-6).all()]
                assert fits, f"{name}: no source digit fits the {corner} corner"
                if len(fits) == 1:
                    used.add(fits[0])
        seen[name] = used
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    # Nearly all source digits were recognised, so the check above had something to look at.
    for name, (count, _) in SPLITS.items():
        assert 0.85 * count < len(seen[name]) <= count


def test_overlay_by_hand():
    left = torch.tensor([[[1.0, 0.2], [0.0, 0.4]]])
    right = torch.tensor([[[0.3, 0.6], [0.7, 0.9]]])
    expected = [[1.0, 0.2, 0.0], [0.0, 0.4, 0.6], [0.0, 0.7, 0.9]]
    canvas = overlay(left, right, 3)
    assert canvas.shape == (1, 1, 3, 3)
    assert torch.equal(canvas[0, 0], torch.tensor(expected))
    # The brighter pixel stays, whichever digit it belongs to.
    assert overlay(left, right * 0, 3)[0, 0, 1, 1] == pytest.approx(0.4)
    assert overlay(left * 0, right, 3)[0, 0, 1, 1] == pytest.approx(0.3)
    assert torch.equal(left, torch.tensor([[[1.0, 0.2], [0.0, 0.4]]]))


def test_labels_belong_to_their_corners(bench, digits):
    """Every left half is at least as bright as some source digit of the named class."""
    pixels, labels = digits
    split = bench.data["val"]
    for i in range(0, 200, 7):
        for corner, target in (
            (split.inputs[i, 0, :8, :8], split.targets[0][i]),
            (split.inputs[i, 0, 2:, 2:], split.targets[1][i]),
        ):
            candidates = pixels[labels == target]
            assert ((corner - candidates) >= -1e-6).flatten(1).all(1).any()


# ----------------------------------------------------------------------------------- batches


def numbered(n):
    return Data(torch.arange(n).float()[:, None], (torch.arange(n), torch.arange(n) * 10))


@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 100))
def test_shuffled_batches_are_full_and_hold_no_example_twice(n, size, seed):
    batches = list(numbered(n).batches(size, torch.Generator().manual_seed(seed)))
    full = min(n, size)
    assert [len(x) for x, _ in batches] == [full] * (n // full)
    ids = [int(i) for x, _ in batches for i in x]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= set(range(n))
    if n % full == 0:
        assert set(ids) == set(range(n))
    for x, (a, b) in batches:
        assert torch.equal(x[:, 0].long(), a)
        assert torch.equal(a * 10, b)


@given(n=st.integers(1, 40), size=st.integers(1, 50))
def test_batches_in_order_hold_every_example_once(n, size):
    ids = [int(i) for x, _ in numbered(n).batches(size) for i in x]
    assert ids == list(range(n))


def test_order_follows_the_generator_alone():
    def ids(seed, epochs=1):
        generator = torch.Generator().manual_seed(seed)
        return [
            [int(i) for x, _ in numbered(20).batches(5, generator) for i in x]
            for _ in range(epochs)
        ]

    first = ids(3, 2)
    torch.manual_seed(1234)
    assert ids(3, 2) == first
    assert first[0] != first[1]
    assert ids(4, 2) != first


def test_left_out_examples_change_from_epoch_to_epoch():
    generator = torch.Generator().manual_seed(0)
    seen = Counter(
        int(i) for _ in range(50) for x, _ in numbered(11).batches(10, generator) for i in x
    )
    assert set(seen) == set(range(11))


# --------------------------------------------------------------------- the base's common parts


def test_evaluation_does_not_depend_on_batches_and_matches_plain_counting(bench, monkeypatch):
    model = bench.model(0)
    scores = bench.evaluate(model, "val")
    data = bench.data["val"]
    model.eval()
    with torch.no_grad():
        outputs = model(data.inputs)
    for task, output, target in zip(bench.tasks, outputs, data.targets, strict=True):
        expected = 100 * float((output.argmax(1) == target).double().mean())
        assert scores[task.name]["accuracy"] == pytest.approx(expected, abs=0.1)


def test_evaluation_leaves_training_mode_and_no_gradients(bench):
    model = bench.model(0)
    bench.evaluate(model, "val")
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_losses_of_chosen_tasks_with_and_without_a_shared_trunk(bench):
    batch = bench.probe()
    for single in (False, True):
        model = bench.model(0, single)
        every, features = bench.losses(model, batch)
        only, _ = bench.losses(model, batch, [1])
        assert torch.equal(only[0], every[1])
        assert (features is None) == single
        assert [loss.shape for loss in every] == [(), ()]


def test_single_task_networks_are_as_large_as_the_shared_one(bench):
    shared, single = bench.model(0), bench.model(0, True)
    assert len(single.head_parameters()) == 2
    trunk = sum(p.numel() for p in shared.shared_parameters())
    head = sum(p.numel() for p in shared.head_parameters()[0])
    assert [sum(p.numel() for p in group) for group in single.head_parameters()] == [
        trunk + head
    ] * 2


def test_protocol_makes_the_optimiser_and_schedule_it_names():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    adam = Protocol(epochs=4, batch_size=1, lr=0.1, weight_decay=0.3).make_optimizer(parameters)
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["betas"] == (0.9, 0.999)
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.1, 0.3)
    protocol = Protocol(epochs=4, batch_size=1, lr=0.1, optimizer="sgd")
    sgd = protocol.make_optimizer(parameters)
    assert type(sgd) is torch.optim.SGD
    assert sgd.defaults["momentum"] == 0.9
    assert [protocol.lr_factor(e) for e in range(4)] == [1.0] * 4
    cosine = dataclasses.replace(protocol, schedule="cosine")
    factors = [cosine.lr_factor(e) for e in range(5)]
    assert factors == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(ValueError, match="multidigits"):
        create("multidigit")
