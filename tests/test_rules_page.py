"""The page on which gradients are dragged: its rules against the package, its handles and keys."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from browser import ask

from mtl_tutorial import plots
from mtl_tutorial.methods import create

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "book" / "_static" / "rules.js"
SETTINGS = {"pcgrad": {"order": "fixed"}}
POSITIONS = 100


def positions() -> list[list[list[float]]]:
    """Random gradients in the plane, of lengths 0.05 to 3, two and three tasks in turn."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(POSITIONS):
        k = 2 + number % 2
        angle = 2 * math.pi * torch.rand(k, generator=generator, dtype=torch.float64)
        length = 0.05 * 60 ** torch.rand(k, generator=generator, dtype=torch.float64)
        found.append((torch.stack([angle.cos(), angle.sin()], 1) * length[:, None]).tolist())
    return found


# Runs beside rules.js: every rule at every position, then one drag and two keys.
PROBE = """
const found = positions.map((g) => Object.fromEntries(Object.entries(mtlRules.rules).map(
  ([name, rule]) => [name, rule(g)])));
const kept = positions.map((g, i) => Object.fromEntries(Object.entries(mtlRules.methods).map(
  ([name, { holds }]) => [name, holds(g, found[i][name].direction, found[i][name].weights)])));
const cones = positions.map((g) => mtlRules.descentCone(g) !== null);
const colors = Object.fromEntries(Object.entries(mtlRules.methods).map(
  ([name, { color }]) => [name, color]));

const all = (what) => [...document.querySelectorAll(what)];
const says = () => ({
  angles: all(".mtl-handle").map((x) => x.getAttribute("aria-valuetext")),
  weights: document.querySelector("[data-method=imtl_g]").querySelectorAll("td")[1].textContent,
  arrows: document.querySelectorAll(".mtl-plane .mtl-arrow").length,
  status: document.querySelector(".mtl-status").textContent,
});
const at = (x, y) => {
  const area = document.querySelector(".mtl-plane").getBoundingClientRect();
  const [right, down] = [x + 3, 3 - y].map((length) => length / 6 * area.width);
  return { clientX: area.left + right, clientY: area.top + down,
    pointerId: 1, pointerType: "touch", bubbles: true };
};
const story = [says()];
const grip = document.querySelector(".mtl-handle");
grip.dispatchEvent(new PointerEvent("pointerdown", at(2, 0.4)));
grip.dispatchEvent(new PointerEvent("pointermove", at(0, 1.5)));
grip.dispatchEvent(new PointerEvent("pointerup", at(0, 1.5)));
grip.dispatchEvent(new PointerEvent("pointermove", at(1, 1)));
story.push(says());
const press = (key, shiftKey) => grip.dispatchEvent(
  new KeyboardEvent("keydown", { key, shiftKey, bubbles: true }));
press("ArrowLeft", true);
press("ArrowUp", false);
story.push(says());
document.querySelector("[aria-label='Show CAGrad, c = 0.4']").click();
story.push(says());
document.querySelector("input[value='3']").click();
story.push(says());
for (let i = 0; i < 20; i += 1) press("ArrowUp", true);
story.push(says());
return { found, kept, cones, colors, story };
"""


@pytest.fixture(scope="module")
def browser():
    """What the browser computed and showed."""
    probe = f"const positions = {json.dumps(positions())};{PROBE}"
    return ask(probe, script=SCRIPT, body="<div id=mtl-rules><img alt=fallback></div>")


def names() -> list[str]:
    """Rules that the script defines."""
    body = SCRIPT.read_text(encoding="utf-8").split("const rules = {")[1].split("\n  };")[0]
    return re.findall(r"^    (\w+)(?:: \(g\) =>|\(g\) \{)", body, re.M)


@pytest.mark.parametrize("name", names())
def test_rule_is_the_package_s(browser, name):
    for rows, found in zip(positions(), browser["found"], strict=True):
        jacobian = torch.tensor(rows, dtype=torch.float64)
        losses = torch.ones(len(rows), dtype=torch.float64)
        method = create(name, **SETTINGS.get(name, {}))
        expected = method.direction(jacobian, losses=losses)
        got = torch.tensor(found[name]["direction"], dtype=torch.float64)
        size = jacobian.norm(dim=1).max()
        # Where zero lies in the hull, rounding on either side decides how near to zero a step is.
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7 * size), (rows, got, expected)
        weights = torch.tensor(found[name]["weights"], dtype=torch.float64)
        assert torch.allclose(weights @ jacobian, got, atol=1e-7 * size), (rows, weights)


def test_all_rules_are_compared_and_look_as_in_the_figures(browser):
    assert len(names()) >= 10
    assert sorted(names()) == sorted(browser["found"][0]) == sorted(browser["colors"])
    for name, color in browser["colors"].items():
        assert plots.style(name)["color"] == color


def test_promises_hold_at_every_position(browser):
    for rows, kept in zip(positions(), browser["kept"], strict=True):
        assert False not in kept.values(), (rows, kept)
    # A promise that is never looked at would say nothing.
    assert all(any(kept[name] for kept in browser["kept"]) for name in names() if name != "equal")


def test_shaded_wedge_is_there_where_a_step_lowers_all_losses(browser):
    for rows, cone in zip(positions(), browser["cones"], strict=True):
        jacobian = torch.tensor(rows, dtype=torch.float64)
        step = create("mgda", normaliser="l2").direction(jacobian)
        assert cone == bool((jacobian @ step > 1e-9).all()), rows
    assert 0 < sum(browser["cones"]) < POSITIONS


def test_drag_keys_and_choices_change_the_figure(browser):
    start, dragged, keyed, chosen, three, longest = browser["story"]
    assert start["angles"][0] == "11 degrees, length 2.04"
    assert start["status"].startswith("In conflict: tasks 1 and 2.")
    assert dragged["angles"] == ["90 degrees, length 1.50", start["angles"][1]]
    assert dragged["weights"] != start["weights"]
    assert keyed["angles"][0] == "95 degrees, length 1.55"
    assert chosen["arrows"] == keyed["arrows"] + 1
    assert len(three["angles"]) == 3
    assert "Pareto stationary" in three["status"]
    # A key for the length leaves the angle alone, also where the figure ends.
    assert three["angles"][0] == "11 degrees, length 2.04"
    assert longest["angles"][0] == "11 degrees, length 2.91"


def test_page_has_a_figure_for_readers_without_script():
    page = (ROOT / "book" / "rules.md").read_text(encoding="utf-8")
    assert (ROOT / "book" / "_static" / "rules.png").is_file()
    assert re.search(r'<img src="../_static/rules.png"[^>]*\salt="[^"]{40,}"', page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", SCRIPT.read_text(encoding="utf-8"))
