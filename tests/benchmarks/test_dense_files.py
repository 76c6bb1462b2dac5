"""Loaders of NYUv2, Cityscapes, CelebA and CamVid on tiny files in the published layouts."""

import dataclasses
import shutil

import dense_files as files
import numpy as np
import pytest
import torch
from torchvision import datasets

from mtl_tutorial import benchmarks, training
from mtl_tutorial.benchmarks import camvid, cityscapes
from mtl_tutorial.benchmarks.dense import MappedData
from mtl_tutorial.noise import LabelNoise

CPU = torch.device("cpu")
SMALL = {"size": files.SIZE, "epochs": 1}


@pytest.fixture(autouse=True)
def no_official_sums(monkeypatch):
    """The tiny CelebA is not the official one."""
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)


WRITERS = {
    "nyuv2": files.nyuv2,
    "cityscapes": files.cityscapes_npy,
    "cityscapes3": files.cityscapes_folders,
    "celeba": files.celeba_files,
    "camvid": files.camvid_files,
}


def prepared(name, root, **changes):
    bench = benchmarks.create(name, root)
    protocol = dataclasses.replace(bench.protocols["quick"], **{**SMALL, **changes})
    return bench.under(protocol).prepare(CPU)


def only(bench, split="train"):
    """All examples of a split, in order."""
    return next(bench.data[split].batches(100))


@pytest.mark.parametrize("name", WRITERS)
def test_four_frames_train_one_epoch_with_the_small_budget(name, tmp_path):
    WRITERS[name](tmp_path)
    assert benchmarks.create(name, tmp_path).here()
    bench = prepared(name, tmp_path, batch_size=2)
    assert [len(bench.data[s]) for s in ("train", "val", "test")] == [4, 4, 4]
    spec = training.parse_spec("aligned_mtl")
    cell = training.Cell(name, "quick", bench.protocol, spec, 0)
    result = training.train(cell, bench, tmp_path / "results")
    assert result["failed"] is None
    assert set(result["test"]) == {task.name for task in bench.tasks}
    assert all(len(x) == 64 for x in result["data"].values())


def test_nyuv2_gives_each_frame_its_maps(tmp_path):
    images, (label, depth, normal) = only(prepared("nyuv2", files.nyuv2(tmp_path)))
    assert images.shape == (4, 3, *files.SIZE)
    assert images.dtype == torch.float32
    stored = np.load(tmp_path / "nyuv2/train/image/2.npy").transpose(2, 0, 1)
    assert torch.equal(images[2], torch.tensor(stored, dtype=torch.float32))
    for i in range(4):
        assert (label[i, 0] == -1).all()
        assert (label[i, 1:] == i).all()
        assert (depth[i, 0] == 0).all()
        assert (depth[i, 1:] == i + 1).all()
    assert (normal[:, :, 0] == 0).all()
    assert (normal[:, 2, 1:] == -1).all()


def test_nyuv2_is_mapped_and_read_when_asked(tmp_path, monkeypatch):
    modes = []
    load = np.load

    def spy(path, mmap_mode=None, **rest):
        modes.append(mmap_mode)
        return load(path, mmap_mode=mmap_mode, **rest)

    monkeypatch.setattr(np, "load", spy)
    bench = prepared("nyuv2", files.nyuv2(tmp_path))
    assert isinstance(bench.data["train"], MappedData)
    before = len(modes)
    next(bench.data["train"].batches(1))
    assert len(modes) == before + 4
    assert set(modes) == {"r"}


def test_mapped_batches_are_the_shuffle_of_the_seed_and_leave_the_short_one_out(tmp_path):
    data = prepared("nyuv2", files.nyuv2(tmp_path)).data["train"]
    orders = [
        [int(t[0][0, 1, 0]) for _, t in data.batches(1, torch.Generator().manual_seed(s))]
        for s in (0, 0, 1, 2, 3)
    ]
    assert (
        orders[0]
        == orders[1]
        == torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    )
    assert len({tuple(o) for o in orders}) > 1
    assert [len(x) for x, _ in data.batches(3, torch.Generator())] == [3]
    assert [len(x) for x, _ in data.batches(3)] == [3, 1]
    assert [len(x) for x, _ in data.first(2).batches(3)] == [2]


def test_reading_draws_nothing_from_the_global_generator(tmp_path):
    data = prepared("nyuv2", files.nyuv2(tmp_path)).data["train"]
    before = torch.get_rng_state()
    list(data.batches(2, torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("task", ["segmentation", "depth", "normals"])
def test_noise_is_applied_to_mapped_data(task, tmp_path):
    clean = prepared("nyuv2", files.nyuv2(tmp_path))
    k = [t.name for t in clean.tasks].index(task)
    noise = LabelNoise(task, 0.5)
    noisy = clean.with_noise(noise, seed=3, epoch=0)
    before, after, again, later = (
        only(bench)[1] for bench in (clean, noisy, noisy, clean.with_noise(noise, seed=3, epoch=1))
    )
    changed = [not torch.equal(a, b) for a, b in zip(before[k], after[k], strict=True)]
    assert [i for i in range(4) if changed[i]] == sorted(noise.chosen(4, 3).tolist())
    assert torch.equal(after[k], again[k])
    assert not torch.equal(after[k], later[k])
    for other in {0, 1, 2} - {k}:
        assert torch.equal(before[other], after[other])
    assert all(
        torch.equal(a, b) for a, b in zip(only(clean, "val")[1], only(noisy, "val")[1], strict=True)
    )
    i = changed.index(True)
    if task == "segmentation":
        assert set(after[k][i].unique().tolist()) == set(range(-1, 13))
    if task == "normals":
        assert after[k][i].norm(dim=0).sub(1).abs().max() < 1e-5


def test_noise_reaches_the_losses_of_a_run(tmp_path):
    files.nyuv2(tmp_path)
    bench = prepared("nyuv2", tmp_path, batch_size=2)
    losses = []
    for noise in (None, LabelNoise("depth", 1.0)):
        cell = training.Cell(
            "nyuv2", "quick", bench.protocol, training.parse_spec("equal"), 0, noise
        )
        losses.append(training.train(cell, bench, tmp_path)["history"][0]["train_losses"])
    assert losses[0][1] != pytest.approx(losses[1][1], rel=0.05)


@pytest.mark.parametrize("label", ["label", "label_7"])
def test_cityscapes_in_mtan_files(label, tmp_path):
    _, (labels, depth) = only(prepared("cityscapes", files.cityscapes_npy(tmp_path, label=label)))
    assert torch.equal(
        labels[1], torch.tensor(np.load(tmp_path / f"cityscapes/train/{label}/1.npy")).to(labels)
    )
    assert depth.shape == (4, *files.SIZE)


def test_cityscapes_in_its_own_folders_with_two_tasks(tmp_path):
    bench = prepared("cityscapes", files.cityscapes_folders(tmp_path))
    _, (label, depth) = only(bench)
    assert (label[:, :12] == 0).all()  # flat
    assert (label[:, 12:, :16] == 6).all()  # vehicle
    assert (label[:, 12:, 16:] == -1).all()
    assert (depth[:, :, 0] == 0).all()
    assert torch.allclose(depth[:, :, 1:], torch.tensor(8 / 32))
    assert "share of the width" in bench.remark


def test_cityscapes_with_three_tasks(tmp_path):
    files.cityscapes_folders(tmp_path)
    _, (label, offset, disparity) = only(prepared("cityscapes3", tmp_path))
    assert (label[:, :12] == 0).all()  # road
    assert (label[:, 12:, :16] == 13).all()  # car
    assert offset[:, :, :12].isnan().all()
    assert offset[:, :, :, 16:].isnan().all()
    # Rows 12 to 23 and columns 0 to 15: the centre is at x = 7.5, y = 17.5.
    assert offset[0, :, 12, 0].tolist() == [7.5, 5.5]
    assert offset[0, :, 23, 15].tolist() == [-7.5, -5.5]
    assert torch.allclose(disparity[:, :, 1:], torch.tensor(8.0))
    _, (_, half_offset, half) = only(prepared("cityscapes3", tmp_path, size=(12, 16)))
    assert torch.allclose(half[:, :, 1:], torch.tensor(4.0))  # pixels of the smaller image
    assert half_offset[0, :, 6, 0].tolist() == [3.5, 2.5]


def test_every_class_has_its_category():
    table = cityscapes.class_table(19)
    assert sorted(table[table >= 0].tolist()) == list(range(19))
    assert set(cityscapes.class_table(7).tolist()) == set(range(-1, 7))


def test_celeba_has_the_official_splits_and_attributes(tmp_path):
    bench = prepared("celeba", files.celeba_files(tmp_path))
    for s, split in enumerate(("train", "val", "test")):
        images, targets = only(bench, split)
        assert images.shape == (4, 3, *files.SIZE)
        assert images[2].mean().item() == pytest.approx((40 * s + 20) / 255, abs=0.01)
        assert torch.equal(torch.stack(targets, 1).long(), torch.eye(40).long()[4 * s : 4 * s + 4])


@pytest.mark.parametrize("archive", [False, True])
def test_camvid_from_folder_and_archive(archive, tmp_path):
    files.camvid_files(tmp_path, archive=archive)
    images, targets = only(prepared("camvid", tmp_path))
    assert images[3].unique().tolist() == pytest.approx([120 / 255])
    assert len(targets) == 11
    for k, target in enumerate(targets):
        assert (target[:, 0] == -1).all()  # void
        for i in range(4):
            assert (target[i, 1:] == int(i == k)).all()


def test_noise_on_camvid_leaves_void_alone(tmp_path):
    bench = prepared("camvid", files.camvid_files(tmp_path))
    noisy = bench.with_noise(LabelNoise("sky", 1.0), 0, 0)
    target = only(noisy)[1][0]
    assert (target[:, 0] == -1).all()
    assert set(target[:, 1:].unique().tolist()) == {0, 1}


# ------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", WRITERS)
def test_missing_data_say_where_they_belong(name, tmp_path):
    assert not benchmarks.create(name, tmp_path).here()
    with pytest.raises(FileNotFoundError, match=f"expected .*{tmp_path}.* got .*; "):
        prepared(name, tmp_path)


FIRST = {
    "nyuv2": "nyuv2/val/normal/3.npy",
    "cityscapes": "cityscapes/train/depth/1.npy",
    "cityscapes3": "cityscapes/disparity/train/aachen/aachen_000002_000019_disparity.png",
    "celeba": "celeba/img_align_celeba/000002.jpg",
    "camvid": "camvid/testannot/x1.png",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_file_is_named_before_training(name, tmp_path):
    WRITERS[name](tmp_path)
    (tmp_path / FIRST[name]).unlink()
    with pytest.raises(FileNotFoundError, match=FIRST[name].split("/")[-1]):
        prepared(name, tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_file_is_named(name, tmp_path):
    WRITERS[name](tmp_path)
    path = tmp_path / FIRST[name]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"expected .*{path.name}.* got .*; get it again"):
        list(prepared(name, tmp_path).data["train"].batches(1))


@pytest.mark.parametrize(
    ("file", "values", "complaint"),
    [
        ("nyuv2/train/depth/0.npy", np.ones(files.SIZE), r"shape \(H, W, 1\)"),
        ("nyuv2/train/label/1.npy", np.ones((*files.SIZE, 1)), r"shape \(H, W\)"),
        ("nyuv2/train/normal/1.npy", np.ones((24, 31, 3)), "as its image"),
        ("nyuv2/train/label/2.npy", np.full(files.SIZE, 13.0), "labels -1 to 12"),
        ("nyuv2/train/depth/2.npy", np.full((*files.SIZE, 1), np.nan), "finite"),
    ],
)
def test_a_file_of_another_shape_or_range_is_named(file, values, complaint, tmp_path):
    files.nyuv2(tmp_path)
    np.save(tmp_path / file, values)
    with pytest.raises(ValueError, match=complaint) as error:
        list(prepared("nyuv2", tmp_path).data["train"].batches(1))
    assert file in str(error.value)


def test_a_broken_archive_and_coloured_labels_are_named(tmp_path):
    (tmp_path / camvid.ARCHIVE).write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="whole archive"):
        prepared("camvid", tmp_path)
    files.camvid_files(tmp_path)
    shutil.copy(tmp_path / "camvid/train/x0.png", tmp_path / "camvid/trainannot/x0.png")
    with pytest.raises(ValueError, match="colours are no labels"):
        prepared("camvid", tmp_path)


def test_celeba_refuses_files_that_are_not_official(tmp_path, monkeypatch):
    files.celeba_files(tmp_path)
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: False)
    with pytest.raises(ValueError, match="official files"):
        prepared("celeba", tmp_path)


# ------------------------------------------------------------------------ published protocols

PUBLISHED = [
    (name, protocol)
    for name in WRITERS
    for protocol in benchmarks.CLASSES[name].protocols
    if protocol not in ("quick", "cpu") and (protocol != "full" or name == "camvid")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "protocol"), PUBLISHED)
def test_four_frames_train_one_epoch_of_every_protocol(name, protocol, tmp_path, monkeypatch):
    WRITERS[name](tmp_path)
    bench = benchmarks.create(name, tmp_path)
    published = bench.protocols[protocol]
    smaller = dataclasses.replace(
        published,
        epochs=1,
        size=(32, 64),
        average=1,
        batch_size=2,
        network=published.network.removesuffix("_pretrained"),  # no weights are downloaded
    )
    bench = bench.under(smaller).prepare(CPU)
    cell = training.Cell(name, protocol, smaller, training.parse_spec("equal"), 0)
    result = training.train(cell, bench, tmp_path / "results")
    assert result["failed"] is None
    if published.evaluation == "papers":
        assert bench.eval_batch == 2
