"""The matrices that other tests rely on have the property that their name promises."""

import pytest
import torch
from helpers import (
    degenerate,
    equal_angles,
    of_rank,
    orthogonal,
    stationary,
    vector,
    with_condition,
)


@pytest.mark.parametrize("seed", range(3))
def test_matrices_have_their_property(seed):
    q = orthogonal(5, seed)
    torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=torch.float64))

    values = torch.linalg.svdvals(with_condition(4, 7, 50.0, seed))
    torch.testing.assert_close(values[0], vector(50.0)[0])
    torch.testing.assert_close(values[-1], vector(1.0)[0])

    assert torch.linalg.matrix_rank(of_rank(4, 6, 2, seed)) == 2

    rows, weights = stationary(4, 6, seed)
    assert weights.min() > 0
    assert (weights @ rows).norm() < 1e-12
    assert rows.norm(dim=1).min() > 0

    norms = vector(1.0, 2.0, 4.0)
    rows = equal_angles(norms, 5, 0.3, seed)
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.norm(dim=1), norms)
    torch.testing.assert_close((unit @ unit.T)[~torch.eye(3, dtype=torch.bool)], vector(*[0.3] * 6))


def test_degenerate_matrices_have_their_property():
    rank = {name: int(torch.linalg.matrix_rank(j)) for name, j in degenerate().items()}
    assert rank["all_zero"] == rank["one_task_zero"] == 0
    assert rank["zero_row"] == rank["sum_zero"] == rank["duplicate_pair"] == 2
    for name in ("parallel", "parallel_pair", "antiparallel", "duplicates", "two_zero_rows"):
        assert rank[name] == 1
    assert degenerate()["sum_zero"].sum(0).abs().max() < 1e-12
    k, p = degenerate()["more_tasks_than_parameters"].shape
    assert k > p
