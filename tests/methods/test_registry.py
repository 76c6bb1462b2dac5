"""`available` and `create`: names, nearest names, settings."""

from __future__ import annotations

import inspect

import pytest

from mtl_tutorial import methods
from mtl_tutorial.methods import CLASSES, AlignedMTL, Method, available, create


def test_available_is_sorted_and_complete():
    assert available() == sorted(CLASSES)
    assert {"equal", "excess_mtl", "aligned_mtl", "imtl_g", "imtl_l", "imtl"} <= set(available())


def test_every_method_class_in_the_package_is_registered():
    """A class that is imported but not registered would be neither listed nor tested."""
    found = {x for x in vars(methods).values() if inspect.isclass(x) and issubclass(x, Method)}
    assert found - {Method} == set(CLASSES.values())


def test_every_registered_class_can_be_imported_from_the_package():
    for cls in CLASSES.values():
        assert getattr(methods, cls.__name__) is cls
        assert cls.__name__ in methods.__all__


def test_create_passes_settings_on():
    method = create("aligned_mtl", scale="median", head_gradients="weighted")
    assert type(method) is AlignedMTL
    assert (method.scale, method.head_gradients) == ("median", "weighted")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("aligned", "aligned_mtl"),
        ("excesmtl", "excess_mtl"),
        ("imtl-g", "imtl_g"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"no method '{name}'") as error:
        create(name)
    assert "did you mean" in str(error.value)
    assert nearest in str(error.value).split("?")[0]
    assert ", ".join(available()) in str(error.value)


def test_a_name_like_no_other_gets_the_list_alone():
    with pytest.raises(ValueError, match="no method 'zzzz'; methods: ") as error:
        create("zzzz")
    assert "did you mean" not in str(error.value)


def test_unknown_settings_are_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"'aligned_mtl' has no setting 'scal'; did you mean scale"):
        create("aligned_mtl", scal="min")
    with pytest.raises(TypeError, match="settings: scale, preference, head_gradients"):
        create("aligned_mtl", zzz=1)


def test_bad_values_of_known_settings_are_value_errors():
    with pytest.raises(ValueError, match="expected scale min, median, rmse, got 'max'"):
        create("aligned_mtl", scale="max")
