"""Writes tiny data sets in their published layouts, four frames each."""

import zipfile

import numpy as np
from PIL import Image

from mtl_tutorial.benchmarks import camvid, celeba

N = 4
SIZE = (24, 32)


def nyuv2(root, n=N, size=SIZE):
    """MTAN's files; every map says which frame it is of: labels i, depths i + 1."""
    for split in ("train", "val"):
        for i in range(n):
            rng = np.random.default_rng(i)
            label = np.full(size, float(i))
            label[0] = -1
            depth = np.full((*size, 1), i + 1.0)
            depth[0] = 0
            normal = np.zeros((*size, 3))
            normal[1:, :, 2] = -1
            maps = {"image": rng.random((*size, 3)), "label": label, "depth": depth}
            for name, values in {**maps, "normal": normal}.items():
                folder = root / "nyuv2" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{i}.npy", values)
    return root


def cityscapes_npy(root, n=N, size=SIZE, label="label_7"):
    for split in ("train", "val"):
        for i in range(n):
            rng = np.random.default_rng(i)
            maps = {
                "image": rng.random((*size, 3)),
                label: rng.integers(-1, 7, size).astype(float),
                "depth": rng.uniform(0.01, 0.5, (*size, 1)),
            }
            for name, values in maps.items():
                folder = root / "cityscapes" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{i}.npy", values)
    return root


def cityscapes_folders(root, n=N, size=SIZE):
    """Own layout: the upper half road, the lower half one car (instance 26001) and nothing."""
    height, width = size
    for split, city in (("train", "aachen"), ("val", "ulm")):
        for i in range(n):
            name = f"{city}_{i:06d}_000019"
            image = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
            label = np.full(size, 7, np.uint8)
            label[height // 2 :, : width // 2] = 26
            label[height // 2 :, width // 2 :] = 4
            instance = label.astype(np.uint16)
            instance[label == 26] = 26001
            disparity = np.full(size, 256 * 8 + 1, np.uint16)
            disparity[:, 0] = 0
            for folder, suffix, pixels in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", label),
                ("gtFine", "gtFine_instanceIds", instance),
                ("disparity", "disparity", disparity),
            ):
                path = root / "cityscapes" / folder / split / city
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path / f"{name}_{suffix}.png")
    return root


def celeba_files(root, n=N):
    """torchvision's layout, n faces in each of the three splits; face i has attribute i alone."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(3 * n)]
    for i, name in enumerate(names):
        pixels = np.full((218, 178, 3), 10 * i, np.uint8)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)
    attributes = [
        " ".join([name, *("1" if k == i else "-1" for k in range(40))])
        for i, name in enumerate(names)
    ]
    head = [str(len(names)), " ".join(celeba.ATTRIBUTES)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*head, *attributes]) + "\n")
    plain = {
        "list_eval_partition.txt": [f"{name} {i // n}" for i, name in enumerate(names)],
        "identity_CelebA.txt": [f"{name} {i}" for i, name in enumerate(names)],
        "list_bbox_celeba.txt": ["12", "a b c d", *(f"{name} 1 2 3 4" for name in names)],
        "list_landmarks_align_celeba.txt": ["12", "a b", *(f"{name} 1 2" for name in names)],
    }
    for name, lines in plain.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return root


def camvid_files(root, n=N, size=SIZE, archive=False):
    """The usual folder, or the archive; frame i is of class i, its first row of none."""
    folder = root / (camvid.FOLDER if not archive else "unpacked")
    for split in camvid.SPLITS:
        for name in (split, f"{split}annot"):
            (folder / name).mkdir(parents=True)
        for i in range(n):
            image = np.full((*size, 3), 40 * i, np.uint8)
            label = np.full(size, i, np.uint8)
            label[0] = 11
            Image.fromarray(image).save(folder / split / f"x{i}.png")
            Image.fromarray(label).save(folder / f"{split}annot" / f"x{i}.png")
    if archive:
        with zipfile.ZipFile(root / camvid.ARCHIVE, "w") as file:
            for path in sorted(folder.rglob("*.png")):
                file.write(path, path.relative_to(folder).as_posix())
    return root
