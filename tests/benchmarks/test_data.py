"""Loaders on small files in the published layouts, and their complaints about bad ones.

The real sets are used where MTL_TUTORIAL_DATA points to them, or a folder of shared data lies
beside the checkout; each such test is skipped with its reason elsewhere.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mtl_tutorial import benchmarks, data, training
from mtl_tutorial.benchmarks import class_streams, office_caltech10, office_images, school
from mtl_tutorial.benchmarks.streams import split_indices

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = Path(os.environ.get(data.ENVIRONMENT) or BESIDE)
CPU = torch.device("cpu")


def real(*parts):
    path = REAL.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"no {'/'.join(parts)} at hand")


# ------------------------------------------------------------------------------- where data lie


def test_root_is_the_argument_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "env"))
    assert data.data_root(tmp_path) == tmp_path
    assert data.data_root() == tmp_path / "env"
    monkeypatch.delenv(data.ENVIRONMENT)
    assert data.data_root() == Path.home() / ".cache" / "mtl_tutorial"


@pytest.mark.parametrize("name", [n for n in benchmarks.available() if n not in {"toy"}])
def test_missing_data_are_named_with_a_remedy(name, tmp_path):
    bench = benchmarks.create(name, root=tmp_path)
    if bench.embedded:
        assert bench.here()
        return
    assert not bench.here()
    with pytest.raises(FileNotFoundError, match=r"expected .*, got (no|neither)") as error:
        bench.load()
    assert str(tmp_path) in str(error.value)


# ------------------------------------------------------------------------------- idx files


def test_a_truncated_file_is_named_with_its_checksum(tmp_path):
    for file in data.MNIST_MD5["MNIST"]:
        path = tmp_path / "MNIST" / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"expected .*MD5 6bbc9ace.*got .*5 bytes"):
        data.load_mnist("MNIST", tmp_path, train=True)


@real("MNIST", "raw")
@real("FashionMNIST", "raw")
@pytest.mark.parametrize("name", ["multimnist", "multifashion", "multi_fashion_mnist"])
def test_pairs_show_both_images(name):
    bench = benchmarks.create(name, root=REAL)
    splits = bench.load()
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 50_000,
        "val": 10_000,
        "test": 10_000,
    }
    left_set = data.load_mnist(bench.sources[0], REAL, train=False)
    image = splits["test"].inputs[7, 0]
    assert image.shape == (36, 36)
    assert torch.equal(image[:8, :28], left_set[0][7][:8])  # above the overlap: the left one alone
    assert torch.equal(splits["test"].targets[0], left_set[1])
    assert bench.load()["val"].checksum() == splits["val"].checksum()


@real("MNIST", "raw")
def test_parts_of_mnist_hold_their_own_digits():
    bench = benchmarks.create("mnist_partial5", root=REAL)
    streams = bench.load_streams()
    assert sum(len(d) for d in streams["train"]) == 54_000
    for split in streams.values():
        for part in split:
            assert part.targets[0].unique().tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------- CIFAR-10


def write_cifar_copy(path, train=20, test=4):
    with tarfile.open(path, "w:xz") as tar:
        for split, n in (("train", train), ("test", test)):
            for c, name in enumerate(class_streams.CIFAR_CLASSES):
                for i in range(n):
                    stream = io.BytesIO()
                    pixels = np.full((32, 32, 3), 20 * c + i, dtype=np.uint8)
                    pixels[:4] = 255  # a bright upper edge, to see rotations
                    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
                    member = tarfile.TarInfo(f"{split}/{name}/{i:04}.jpg")
                    member.size = stream.tell()
                    stream.seek(0)
                    tar.addfile(member, stream)


def test_rotations_and_the_copy_is_said(tmp_path):
    write_cifar_copy(tmp_path / "cifar10_jpeg.tar.xz")
    bench = benchmarks.create("cifar10_rotation", root=tmp_path)
    assert bench.here()
    streams = bench.load_streams()
    assert bench.remark == "JPEG copy of CIFAR-10"
    assert [len(d) for d in streams["train"]] == [180] * 4
    assert [len(d) for d in streams["test"]] == [10] * 4  # each photograph once
    upright = [torch.rot90(d.inputs, -k, (2, 3)) for k, d in enumerate(streams["test"])]
    # Even the numbers in their grey values, 20 c + i, tell one photograph from the other.
    assert len({x[:, 16].double().mean().round().item() for s in upright for x in s}) == 40
    bright = [d.inputs[0].double().mean(0) for d in streams["test"]]
    edges = [bright[0][0], bright[1][:, 0], bright[2][-1], bright[3][:, -1]]
    assert all(edge.mean() > 200 for edge in edges)  # upper edge turns left, down, right
    with pytest.raises(ValueError, match="no task 'Delta'"):
        bench.noisy_task(benchmarks.base.LabelNoise("Delta", 0.1))


def test_parts_of_cifar(tmp_path):
    write_cifar_copy(tmp_path / "cifar10_jpeg.tar.xz")
    streams = benchmarks.create("cifar10_partial", root=tmp_path).load_streams()
    assert len(streams["train"]) == 5
    assert sum(len(d) for d in streams["train"]) == 180
    assert all(set(d.targets[0].tolist()) <= {0, 1} for d in streams["train"])


def test_a_broken_archive_is_one_error(tmp_path):
    path = tmp_path / "cifar10_jpeg.tar.xz"
    write_cifar_copy(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="broken archive"):
        benchmarks.create("cifar10_rotation", root=tmp_path).load()


def test_an_archive_is_read_in_memory_and_writes_nothing(tmp_path):
    path = tmp_path / "cifar10_jpeg.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        member = tarfile.TarInfo("train/../../escape.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(ValueError, match="broken archive"):
        benchmarks.create("cifar10_rotation", root=tmp_path).load()
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10_jpeg.tar.xz"]
    assert not (tmp_path.parent / "escape.jpg").exists()


# ------------------------------------------------------------------------------- MATLAB files


def write_domains(folder, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in office_caltech10.FILES:
        mine = np.arange(40) % 10 + 1 if labels is None else labels
        counts = rng.integers(0, 9, (len(mine), 800)).astype(np.uint8)
        savemat(folder / f"{name}_SURF_L10.mat", {"fts": counts, "labels": mine[:, None]})


def test_domains_are_split_and_standardised(tmp_path):
    write_domains(tmp_path / "office_caltech10_surf")
    bench = benchmarks.create("office_caltech10", root=tmp_path)
    assert bench.here()
    streams = bench.load_streams()
    assert [len(d) for d in streams["train"]] == [20] * 4
    assert [len(d) for d in streams["val"]] == [8] * 4
    assert [len(d) for d in streams["test"]] == [12] * 4
    pool = torch.cat([d.inputs for d in streams["train"]])
    assert pool.mean(0).abs().max() < 1e-5
    assert (pool.std(0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fts": np.zeros((4, 800)), "labels": np.array([[1], [2], [3], [11]])}, "labels 0 to 9"),
        ({"fts": np.zeros((4, 799)), "labels": np.ones((4, 1))}, "800 bins"),
        ({"fts": np.zeros((4, 800))}, "unreadable"),
        ({"fts": np.zeros((0, 800)), "labels": np.zeros((0, 1))}, "got none"),
    ],
)
def test_bad_domain_files(tmp_path, content, message):
    savemat(tmp_path / "x.mat", content)
    with pytest.raises(ValueError, match=message):
        office_caltech10.read_domain(tmp_path / "x.mat")


def test_a_domain_file_of_garbage(tmp_path):
    (tmp_path / "x.mat").write_bytes(b"not a matlab file" * 20)
    with pytest.raises(ValueError, match="unreadable"):
        office_caltech10.read_domain(tmp_path / "x.mat")
    with pytest.raises(ValueError, match="unreadable"):
        school.read_school(tmp_path / "x.mat")


def write_school(path, n=139, spoil=None):
    rng = np.random.default_rng(0)
    x, y = np.empty((1, n), dtype=object), np.empty((1, n), dtype=object)
    for k in range(n):
        x[0, k] = rng.integers(0, 2, (12, 28)).astype(float)
        y[0, k] = rng.normal(20, 5, (12, 1))
    if spoil:
        spoil(x, y)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"X": x, "Y": y})


def test_school_reads_139_tasks(tmp_path):
    write_school(tmp_path / "school" / "school.mat")
    bench = benchmarks.create("school", root=tmp_path)
    streams = bench.load_streams()
    assert len(streams["train"]) == len(bench.tasks) == 139
    scores = torch.cat([d.targets[0] for d in streams["train"]])
    assert abs(scores.mean()) < 1e-5
    assert abs(scores.std() - 1) < 1e-5


def nan_score(x, y):
    y[0, 5][2] = np.nan


def short_school(x, y):
    y[0, 7] = y[0, 7][:-1]


@pytest.mark.parametrize(
    ("n", "spoil", "message"),
    [
        (138, None, "139 schools"),
        (139, nan_score, "scores of school 5"),
        (139, short_school, "of school 7"),
    ],
)
def test_bad_school_files(tmp_path, n, spoil, message):
    write_school(tmp_path / "school.mat", n, spoil)
    with pytest.raises(ValueError, match=message):
        school.read_school(tmp_path / "school.mat")


@real("school", "school.mat")
def test_the_real_school_data():
    pairs = school.read_school(REAL / "school" / "school.mat")
    assert sum(len(x) for x, _ in pairs) == 15_362


# ------------------------------------------------------------------------------- image folders


def write_office(root, domains=("Art", "Clipart", "Product", "Real World"), classes=65, n=5):
    for d, domain in enumerate(domains):
        for c in range(classes):
            folder = root / domain / f"class_{c:02}"
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (9, 7), (d * 20, c * 3, i * 9)).save(folder / f"{i}.png")


def test_office_home_folders(tmp_path):
    write_office(tmp_path / "office_home", n=1)
    bench = office_images.OfficeHome(root=tmp_path, side=8)
    streams = bench.load_streams()
    assert [len(d) for d in streams["train"]] == [39] * 4
    assert [len(d) for d in streams["val"]] == [13] * 4
    data_set = streams["test"][3]  # "Real World" is found for Real_World
    label = int(data_set.targets[0][0])
    assert data_set.inputs[0, :, 0, 0].tolist() == [60, label * 3, 0]


def test_office_31_with_split_lists(tmp_path):
    root = tmp_path / "office_31"
    write_office(root, ("amazon", "dslr", "webcam"), 31, n=1)
    for domain in ("amazon", "dslr", "webcam"):
        for split, c in (("train", 3), ("val", 4), ("test", 5)):
            line = f"{domain}/class_{c:02}/0.png {c}\n"
            (root / f"{domain}_{split}.txt").write_text(line)
    streams = office_images.Office31(root=tmp_path, side=8).load_streams()
    assert [d.targets[0].tolist() for d in streams["val"]] == [[4]] * 3
    (root / "dslr_val.txt").write_text("dslr/class_04/0.png four\n")
    with pytest.raises(ValueError, match="line 1 of"):
        office_images.Office31(root=tmp_path, side=8).load_streams()
    (root / "dslr_val.txt").write_text("dslr/class_04/missing.png 4\n")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        office_images.Office31(root=tmp_path, side=8).load_streams()


def test_an_office_with_missing_classes_or_a_broken_image(tmp_path):
    write_office(tmp_path / "office_home", classes=64, n=1)
    with pytest.raises(ValueError, match="65 class folders"):
        office_images.OfficeHome(root=tmp_path, side=8).load_streams()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="unreadable"):
        office_images.read_images([broken], 8)


# ------------------------------------------------------------------------------- streams


def test_a_split_is_a_partition_without_empty_parts():
    for n in (3, 4, 10, 157):
        parts = split_indices(n, (0.5, 0.2), torch.Generator().manual_seed(0))
        assert all(len(p) for p in parts)
        assert sorted(torch.cat(parts).tolist()) == list(range(n))
    with pytest.raises(ValueError, match="at least 3"):
        split_indices(2, (0.5, 0.2), torch.Generator())


def test_streams_of_unequal_length_all_get_used(tmp_path):
    write_domains(tmp_path / "office_caltech10_surf")
    bench = benchmarks.create("office_caltech10", root=tmp_path).prepare(CPU)
    short = bench.data["train/0"]
    bench.data["train/0"] = type(short)(short.inputs[:7], (short.targets[0][:7],))
    protocol = training.Protocol(epochs=1, batch_size=5, lr=1e-3)
    batches = list(bench.batches(protocol, torch.Generator().manual_seed(0)))
    assert len(batches) == 4  # the longest stream's 20 // 5
    assert all(len(batch) == 4 and len(batch[0][0]) == 5 for batch in batches)
    model = bench.model(0)
    losses, features = bench.losses(model, batches[0])
    some, _ = bench.losses(model, batches[0], [2])
    assert features is None
    assert len(losses) == 4
    model.eval()
    losses, _ = bench.losses(model, batches[0])
    some, _ = bench.losses(model, batches[0], [2])
    assert torch.allclose(some[0], losses[2])


def test_every_stream_method_trains(tmp_path):
    write_domains(tmp_path / "office_caltech10_surf")
    bench = benchmarks.create("office_caltech10", root=tmp_path).prepare(CPU)
    protocol = training.Protocol(epochs=1, batch_size=10, lr=1e-3)
    for text in ("single_task", "equal", "aligned_mtl", "independent:optimizers=individual"):
        spec = training.parse_spec(text)
        cell = training.Cell("office_caltech10", "quick", protocol, spec, 0)
        run = training.Run(cell, bench)
        run.epoch_of_training()
        scores = run.history[-1]["val"]
        assert set(scores) == {"amazon", "caltech", "dslr", "webcam"}


# ------------------------------------------------------------------------------- the PDE


def by_autograd(model, points):
    """u and its Laplacian from two differentiations by the points."""
    points = points.detach().requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    laplacian = torch.zeros_like(u)
    for axis in (0, 1):
        (second,) = torch.autograd.grad(first[:, axis].sum(), points, create_graph=True)
        laplacian = laplacian + second[:, axis]
    return u, laplacian


def test_the_laplacian_carried_forward_is_that_of_autograd():
    from mtl_tutorial.benchmarks import helmholtz

    torch.manual_seed(0)
    field = helmholtz.Field().double()
    points = torch.rand(20, 2, dtype=torch.float64) * 2 - 1
    ours, theirs = field.with_laplacian(points), by_autograd(field, points)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = [p for p in field.parameters() if p.dim() == 2]
    gradients = [torch.autograd.grad(pair[1].square().mean(), weights) for pair in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_the_manufactured_solution_solves_the_equation_and_its_edge():
    from mtl_tutorial.benchmarks import helmholtz

    class Exact(torch.nn.Module):
        def forward(self, points):
            return helmholtz.solution(points[:, 0], points[:, 1])

        def with_laplacian(self, points):
            return by_autograd(self, points)

    points = torch.rand(50, 2, dtype=torch.float64) * 2 - 1
    assert helmholtz.residual(Exact(), points).abs().max() < 1e-9
    bench = benchmarks.create("helmholtz").prepare(CPU)
    inside, edge = bench.probe()
    assert (edge.abs().max(1).values == 1).all()
    assert inside.abs().max() < 1
    assert helmholtz.solution(edge[:, 0], edge[:, 1]).abs().max() < 1e-5
    assert bench.evaluate(Exact(), "test")["solution"]["relative L2 %"] < 1e-3


def test_helmholtz_learns_and_refuses_single_task():
    bench = benchmarks.create("helmholtz").prepare(CPU)
    protocol = training.Protocol(epochs=1, batch_size=32, lr=2e-3)
    cell = training.Cell("helmholtz", "quick", protocol, training.parse_spec("imtl_g"), 0)
    run = training.Run(cell, bench)
    run.epoch_of_training()
    assert run.history[-1]["cosine"] is not None
    single = training.Cell("helmholtz", "quick", protocol, training.parse_spec("single_task"), 0)
    with pytest.raises(ValueError, match="single_task"):
        training.Run(single, bench)


def test_photographs_shrink_by_means_of_equal_windows():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    small = class_streams.shrink(images, (2, 2))
    assert small.dtype == torch.uint8 and small.shape == (2, 3, 2, 2)
    assert small[0, 0].tolist() == [[2, 4], [10, 12]]  # of 2.5, 4.5, 10.5, 12.5: to the even one
    assert torch.equal(class_streams.shrink(images, (4, 4)), images)
