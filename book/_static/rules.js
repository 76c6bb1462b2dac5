/* The rules of several methods for two or three gradients in the plane, and a figure to drag them.

   In the plane every rule is a closed form or a search in one unknown, so this file needs nothing
   else. A rule takes gradients [[x, y], ...] and gives {weights, direction}; the direction is what
   the optimiser subtracts. tests/test_rules_page.py compares all rules with the package. */

(function () {
  "use strict";

  const TINY = 1e-12;
  const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
  const norm = (a) => Math.hypot(a[0], a[1]);
  const scaled = (a, s) => [a[0] * s, a[1] * s];
  const plus = (a, b) => [a[0] + b[0], a[1] + b[1]];
  const total = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const polar = (angle, length) => [length * Math.cos(angle), length * Math.sin(angle)];
  const angleOf = (a) => Math.atan2(a[1], a[0]);
  const combine = (g, w) => g.reduce((sum, x, k) => plus(sum, scaled(x, w[k])), [0, 0]);
  const unit = (a) => (norm(a) > 0 ? scaled(a, 1 / norm(a)) : [0, 0]);
  const mean = (g) => combine(g, g.map(() => 1 / g.length));
  const pairs = (k) => (k === 2 ? [[0, 1]] : [[0, 1], [0, 2], [1, 2]]);
  const result = (g, weights) => ({ weights, direction: combine(g, weights) });

  /* s, t with s a + t b = c; null where a and b are parallel. */
  function solve(a, b, c) {
    const det = a[0] * b[1] - a[1] * b[0];
    if (Math.abs(det) <= TINY * norm(a) * norm(b)) return null;
    return [(c[0] * b[1] - c[1] * b[0]) / det, (a[0] * c[1] - a[1] * c[0]) / det];
  }

  /* Eigenvalues and unit eigenvectors of J'J for rows J: [[value, vector], ...], largest first. */
  function axes(rows) {
    const a = total(rows.map((r) => r[0] * r[0]));
    const b = total(rows.map((r) => r[0] * r[1]));
    const c = total(rows.map((r) => r[1] * r[1]));
    const angle = Math.atan2(2 * b, a - c) / 2;
    const of = (v) => a * v[0] * v[0] + 2 * b * v[0] * v[1] + c * v[1] * v[1];
    const vectors = [polar(angle, 1), polar(angle + Math.PI / 2, 1)];
    const found = vectors.map((v) => [of(v), v]);
    return found.filter(([value]) => value > rows.length * TINY * found[0][0]);
  }

  /* x of least length with (U U') x = 1 in the sense of least squares, for unit rows U. */
  function equalProjections(units) {
    const x = units.map(() => 0);
    for (const [value, v] of axes(units)) {
      const along = total(units.map((u) => dot(u, v)));
      units.forEach((u, k) => { x[k] += (dot(u, v) * along) / (value * value); });
    }
    return x;
  }

  /* Angles [low, high] of the steps that raise no loss; null where there are none. */
  function descentCone(g) {
    let [low, high] = [-Math.PI / 2, Math.PI / 2];
    const first = angleOf(g[0]);
    for (const x of g.slice(1)) {
      let turn = angleOf(x) - first;
      turn -= 2 * Math.PI * Math.round(turn / (2 * Math.PI));
      low = Math.max(low, turn - Math.PI / 2);
      high = Math.min(high, turn + Math.PI / 2);
    }
    return high > low + TINY ? [first + low, first + high] : null;
  }

  /* Weights of the projection of sum_k w_k g_k on the cone {d : g_k . d >= 0 for all k}. */
  function projected(g, w) {
    const start = combine(g, w);
    const allowed = (d) => g.every((x) => dot(x, d) >= -TINY * norm(x) * (norm(d) + norm(start)));
    if (allowed(start)) return w;
    const add = (amounts) => w.map((x, k) => x + (amounts[k] || 0));
    let best = null;
    const offer = (weights) => {
      const d = combine(g, weights);
      const far = norm(plus(d, scaled(start, -1)));
      if (best === null || far < best.far) best = { far, weights };
    };
    g.forEach((x, k) => {  // on the edge of one task
      const s = -dot(start, x) / dot(x, x);
      const weights = add({ [k]: s });
      if (s >= 0 && allowed(combine(g, weights))) offer(weights);
    });
    for (const [k, l] of pairs(g.length)) {  // zero, where the cone is nothing else
      const s = solve(g[k], g[l], scaled(start, -1));
      if (s && s[0] >= -TINY && s[1] >= -TINY) offer(add({ [k]: s[0], [l]: s[1] }));
    }
    return best === null ? w : best.weights;
  }

  /* Weights of the shortest vector in the convex hull. */
  function minNorm(g) {
    let best = null;
    const offer = (weights) => {
      const length = norm(combine(g, weights));
      if (best === null || length < best.length) best = { length, weights };
    };
    g.forEach((_, k) => offer(g.map((_x, l) => (l === k ? 1 : 0))));
    for (const [k, l] of pairs(g.length)) {
      const edge = plus(g[l], scaled(g[k], -1));
      if (norm(edge) === 0) continue;
      const t = Math.min(1, Math.max(0, -dot(g[k], edge) / dot(edge, edge)));
      offer(g.map((_x, m) => (m === k ? 1 - t : m === l ? t : 0)));
    }
    if (g.length === 3) {  // zero inside the triangle
      const [a, b] = [plus(g[1], scaled(g[0], -1)), plus(g[2], scaled(g[0], -1))];
      const s = solve(a, b, scaled(g[0], -1));
      if (s && s[0] >= 0 && s[1] >= 0 && s[0] + s[1] <= 1) {
        best = { length: 0, weights: [1 - s[0] - s[1], s[0], s[1]] };
      }
    }
    return best.weights;
  }

  const rules = {
    equal: (g) => result(g, g.map(() => 1 / g.length)),

    mgda: (g) => result(g, minNorm(g)),

    pcgrad(g) {  // every task visits the others in the order of their numbers
      const weights = g.map(() => 1);
      g.forEach((start, i) => {
        let v = start;
        g.forEach((other, j) => {
          const s = dot(v, other) / (dot(other, other) || 1);
          if (j === i || s >= 0) return;
          v = plus(v, scaled(other, -s));
          weights[j] -= s;
        });
      });
      return result(g, weights);
    },

    imtl_g(g) {
      const inverse = g.map((x) => (norm(x) > 0 ? 1 / norm(x) : 0));
      let v = inverse;
      if (g.length > 2) {
        v = equalProjections(g.map(unit)).map((x, k) => x * inverse[k]);
        if (Math.abs(total(v)) <= TINY * total(v.map(Math.abs))) v = inverse;
      }
      const size = Math.abs(total(v));
      return result(g, v.map((x) => (size > 0 ? x / size : x)));
    },

    config(g) {
      const units = g.map(unit);
      const x = equalProjections(units);
      const along = combine(units, x);
      const squared = dot(along, along);
      const length = squared > TINY ? total(g.map((r) => dot(r, along))) / squared : 0;
      return result(g, x.map((a, k) => (norm(g[k]) > 0 ? (a * length) / norm(g[k]) : 0)));
    },

    aligned_mtl(g) {
      const found = axes(g);
      if (!found.length || found[0][0] === 0) return result(g, g.map(() => 0));
      const smallest = Math.sqrt(found[found.length - 1][0]);
      const weights = g.map(() => 0);
      for (const [value, v] of found) {
        const factor = dot(mean(g), v) * smallest * Math.pow(value, -1.5);
        g.forEach((x, k) => { weights[k] += dot(x, v) * factor; });
      }
      return result(g, weights);
    },

    cagrad(g) {  // the best of the few points on the circle where the worst task can be best off
      const c = 0.4;
      const centre = mean(g);
      const radius = c * norm(centre);
      const base = g.map(() => 1 / g.length);
      if (radius <= TINY * Math.max(...g.map(norm))) return result(g, base);
      let best = { worst: -Infinity, weights: base };
      const offer = (weights) => {
        const d = combine(g, weights);
        const worst = Math.min(...g.map((x) => dot(x, d)));
        if (worst > best.worst) best = { worst, weights };
      };
      g.forEach((x, k) => {
        if (norm(x) > 0) offer(base.map((b, l) => (l === k ? b + radius / norm(x) : b)));
      });
      for (const [k, l] of pairs(g.length)) {
        const edge = plus(g[k], scaled(g[l], -1));
        if (norm(edge) === 0) continue;
        const off = -dot(centre, edge) / (norm(edge) * radius);
        if (Math.abs(off) > 1) continue;
        for (const sign of [-1, 1]) {
          const step = polar(angleOf(edge) + sign * Math.acos(off), radius);
          const s = solve(g[k], g[l], step);
          if (!s || s[0] < 0 || s[1] < 0) continue;
          offer(base.map((b, m) => b + (m === k ? s[0] : m === l ? s[1] : 0)));
        }
      }
      return result(g, best.weights);
    },

    nash_mtl(g) {  // |d|^2 = K and weights 1 / (g_k . d): one unknown, the angle of d
      const cone = descentCone(g);
      const size = (w) => 1 / norm(combine(g, w));
      if (cone === null || g.some((x) => norm(x) === 0)) {
        const hull = minNorm(g.map(unit));
        return { weights: hull.map((h, k) => (h / (norm(g[k]) || 1)) * g.length), direction: [0, 0] };
      }
      let [low, high] = cone;
      for (let i = 0; i < 200; i += 1) {
        const middle = (low + high) / 2;
        const [d, turned] = [polar(middle, 1), polar(middle + Math.PI / 2, 1)];
        if (total(g.map((x) => dot(x, turned) / dot(x, d))) > 0) low = middle;
        else high = middle;
      }
      const d = polar((low + high) / 2, 1);
      const weights = g.map((x) => 1 / dot(x, d));
      return result(g, weights.map((w) => w * size(weights)));  // shortened to length one
    },

    dualproj: (g) => result(g, projected(g, g.map(() => 1 / g.length))),

    upgrad(g) {
      const weights = g.map(() => 0);
      g.forEach((_x, i) => {
        projected(g, g.map((_y, k) => (k === i ? 1 : 0))).forEach((w, k) => {
          weights[k] += w / g.length;
        });
      });
      return result(g, weights);
    },
  };

  /* What each rule promises, and whether it holds for these gradients: true, false, or null where
     the promise does not apply. */
  const near = (a, b) => Math.abs(a - b) <= 1e-6 * (1 + Math.abs(a) + Math.abs(b));
  const allNear = (numbers) => numbers.every((x) => near(x, numbers[0]));
  const noneRises = (g, d) => g.every((x) => dot(x, d) >= -1e-9);
  const methods = {
    equal: {
      title: "Equal weighting", color: "#000000", dash: "",
      promise: "the mean gradient; a loss may rise",
      holds: () => null,
    },
    mgda: {
      title: "MGDA", color: "#009E73", dash: "7 3",
      promise: "every loss falls at least at the rate |d|²; zero where no step lowers all",
      holds: (g, d) => g.every((x) => dot(x, d) >= dot(d, d) - 1e-9),
    },
    pcgrad: {
      title: "PCGrad, fixed order", color: "#E69F00", dash: "7 3",
      promise: "no loss rises for two tasks; nothing for three",
      holds: (g, d) => (g.length === 2 ? noneRises(g, d) : null),
    },
    imtl_g: {
      title: "IMTL-G", color: "#009E73", dash: "",
      promise: "equal projections on all unit gradients (three in a plane: nearest to it)",
      holds: (g, d) => (g.length === 2 ? allNear(g.map((x) => dot(unit(x), d))) : null),
    },
    config: {
      title: "ConFIG", color: "#7F7F7F", dash: "7 3",
      promise: "equal angles with all gradients (three in a plane: nearest to it)",
      holds: (g, d) => (g.length === 2 ? allNear(g.map((x) => dot(unit(x), d))) : null),
    },
    aligned_mtl: {
      title: "Aligned-MTL", color: "#D55E00", dash: "",
      promise: "the mean of gradients made orthogonal (rank two) with the smallest singular value",
      holds(g, d) {
        const found = axes(g);
        const smallest = Math.sqrt(found[found.length - 1][0]);
        const parts = found.map(([value, v]) => (smallest * dot(mean(g), v)) / Math.sqrt(value));
        return near(norm(d), Math.hypot(...parts));
      },
    },
    cagrad: {
      title: "CAGrad, c = 0.4", color: "#CC79A7", dash: "7 3",
      promise: "stays within 0.4 |g₀| of the mean g₀ and helps the worst task most",
      holds(g, d) {
        const off = norm(plus(d, scaled(mean(g), -1)));
        return off <= 0.4 * norm(mean(g)) + 1e-9;
      },
    },
    nash_mtl: {
      title: "Nash-MTL", color: "#56B4E9", dash: "7 3",
      promise: "weight times gain is the same for every task; length one",
      holds: (g, d, w) => (norm(d) === 0 ? null : allNear(g.map((x, k) => w[k] * dot(x, d)))),
    },
    dualproj: {
      title: "DualProj", color: "#D55E00", dash: "2 3",
      promise: "no loss rises; the nearest such step to the mean gradient",
      holds: noneRises,
    },
    upgrad: {
      title: "UPGrad", color: "#000000", dash: "7 3",
      promise: "no loss rises; the mean gradient where nothing conflicts",
      holds: noneRises,
    },
  };

  window.mtlRules = { rules, methods, descentCone };

  // ------------------------------------------------------------------------------- the figure

  const SVG = "http://www.w3.org/2000/svg";
  const HALF = 3;  // the figure shows -3 to 3 on both axes
  const REACH = HALF - 0.15;  // of a gradient along an axis
  const STARTS = { 2: [[2, 0.4], [-1, 0.6]], 3: [[2, 0.4], [-0.5, 1.2], [-0.2, -0.7]] };
  const SHOWN = ["equal", "mgda", "imtl_g", "upgrad"];

  function element(name, attributes, parent, text) {
    const svg = ["svg", "g", "path", "line", "circle", "text", "polygon"].includes(name);
    const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    Object.entries(attributes || {}).forEach(([key, value]) => made.setAttribute(key, value));
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  const shown = (x) => (Math.abs(x) < 0.005 ? 0 : x).toFixed(2).replace("-", "−");

  function arrow(parent, to, color, dash, width, label) {
    const length = norm(to);
    const g = element("g", { class: "mtl-arrow" }, parent);
    const paint = color === "#000000" ? "currentColor" : color;
    if (length > 0.02) {
      const back = scaled(to, Math.max(0, length - 0.16) / length);
      const side = scaled([-to[1], to[0]], 0.07 / length);
      const corners = [to, plus(back, side), plus(back, scaled(side, -1))];
      element("line", {
        x1: 0, y1: 0, x2: back[0], y2: -back[1], stroke: paint, "stroke-width": width,
        "stroke-dasharray": dash.split(" ").filter(Boolean).map((x) => x * 0.02).join(" "),
      }, g);
      const points = corners.map((p) => `${p[0]},${-p[1]}`).join(" ");
      element("polygon", { points, fill: paint }, g);
    } else {
      element("circle", { r: 0.06, fill: paint }, g);
    }
    if (label) {
      const at = plus(to, scaled(unit(to), 0.17));
      element("text", { x: at[0], y: -at[1] + 0.06, fill: paint, "text-anchor": "middle" }, g, label);
    }
  }

  function start(box) {
    const state = { k: 2, g: STARTS[2].map((x) => x.slice()), on: new Set(SHOWN) };
    box.textContent = "";
    const choice = element("fieldset", { class: "mtl-tasks" }, box);
    element("legend", {}, choice, "Tasks");
    [2, 3].forEach((k) => {
      const label = element("label", {}, choice);
      const input = element("input", { type: "radio", name: "mtl-tasks", value: k }, label);
      input.checked = k === state.k;
      label.append(k === 2 ? " two" : " three");
      input.addEventListener("change", () => {
        state.k = k;
        state.g = STARTS[k].map((x) => x.slice());
        draw();
      });
    });
    const svg = element("svg", {
      viewBox: `${-HALF} ${-HALF} ${2 * HALF} ${2 * HALF}`, class: "mtl-plane", role: "group",
      "aria-label": "Plane of the gradients; the table below says what the arrows show",
    }, box);
    const picture = element("g", { "aria-hidden": "true" }, svg);
    const handles = element("g", {}, svg);
    const status = element("p", { class: "mtl-status", role: "status" }, box);
    const scroll = element("div", { class: "mtl-scroll", tabindex: "0", role: "region",
      "aria-label": "Methods, weights and guarantees" }, box);
    const table = element("table", { class: "mtl-methods" }, scroll);
    const head = element("thead", {}, table);
    const body = element("tbody", {}, table);

    function move(k, to) {
      state.g[k] = to.map((x) => Math.min(REACH, Math.max(-REACH, x)));
      if (norm(state.g[k]) < 0.05) state.g[k] = polar(angleOf(to), 0.05);
      draw();
    }

    function point(event) {
      const area = svg.getBoundingClientRect();
      const scale = (2 * HALF) / area.width;
      return [(event.clientX - area.left) * scale - HALF,
        HALF - (event.clientY - area.top) * scale];
    }

    function handle(k) {
      const grip = element("circle", { r: 0.2, class: "mtl-handle", tabindex: "0", role: "slider",
        "aria-valuemin": -180, "aria-valuemax": 180 }, handles);
      let held = false;
      grip.addEventListener("pointerdown", (event) => {
        held = true;
        try { grip.setPointerCapture(event.pointerId); } catch (error) { /* an artificial event */ }
        grip.focus();
        event.preventDefault();
      });
      grip.addEventListener("pointermove", (event) => { if (held) move(k, point(event)); });
      ["pointerup", "pointercancel"].forEach((name) => {
        grip.addEventListener(name, () => { held = false; });
      });
      grip.addEventListener("keydown", (event) => {
        const by = event.shiftKey ? 5 : 1;
        const turn = { ArrowLeft: by, ArrowRight: -by }[event.key] || 0;
        const grow = { ArrowUp: 0.05 * by, ArrowDown: -0.05 * by }[event.key] || 0;
        if (!turn && !grow) return;
        event.preventDefault();
        const angle = angleOf(state.g[k]) + (turn * Math.PI) / 180;
        const longest = REACH / Math.max(...polar(angle, 1).map(Math.abs));
        const length = Math.min(longest, Math.max(0.05, norm(state.g[k]) + grow));
        move(k, polar(angle, length));
      });
      return grip;
    }

    function drawPlane(found) {
      picture.textContent = "";
      for (let i = -HALF; i <= HALF; i += 1) {
        const strong = i === 0 ? "mtl-axis" : "mtl-grid";
        element("line", { x1: i, x2: i, y1: -HALF, y2: HALF, class: strong }, picture);
        element("line", { y1: i, y2: i, x1: -HALF, x2: HALF, class: strong }, picture);
      }
      const cone = descentCone(state.g);
      if (cone) {
        const [a, b] = cone.map((angle) => polar(angle, 10));
        const m = polar((cone[0] + cone[1]) / 2, 10);
        const path = `M0,0 L${a[0]},${-a[1]} L${m[0]},${-m[1]} L${b[0]},${-b[1]} Z`;
        element("path", { d: path, class: "mtl-cone" }, picture);
      }
      element("polygon", {
        points: state.g.map((x) => `${x[0]},${-x[1]}`).join(" "), class: "mtl-hull",
      }, picture);
      state.g.forEach((x, k) => arrow(picture, x, "var(--mtl-gradient)", "", 0.05, `g${"₁₂₃"[k]}`));
      Object.keys(methods).filter((name) => state.on.has(name)).forEach((name) => {
        const { color, dash } = methods[name];
        arrow(picture, found[name].direction, color, dash, 0.035);
      });
    }

    function drawHandles() {
      while (handles.childNodes.length > state.k) handles.lastChild.remove();
      while (handles.childNodes.length < state.k) handle(handles.childNodes.length);
      state.g.forEach((x, k) => {
        const grip = handles.childNodes[k];
        const angle = Math.round((angleOf(x) * 180) / Math.PI);
        const said = {
          cx: x[0], cy: -x[1], "aria-label": `Gradient of task ${k + 1}`, "aria-valuenow": angle,
          "aria-valuetext": `${angle} degrees, length ${norm(x).toFixed(2)}`,
        };
        Object.entries(said).forEach(([key, value]) => grip.setAttribute(key, value));
      });
    }

    function drawTable(found) {
      const columns = ["Show", "Method", "Weights", "Gains gₖ · d", "Here", "Promise"];
      if (!head.childNodes.length) {
        const row = element("tr", {}, head);
        columns.forEach((name) => element("th", { scope: "col" }, row, name));
        Object.entries(methods).forEach(([name, { title, color, dash }]) => {
          const line = element("tr", { "data-method": name }, body);
          const input = element("input", {
            type: "checkbox", "aria-label": `Show ${title}`,
          }, element("td", {}, line));
          input.checked = state.on.has(name);
          input.addEventListener("change", () => {
            if (input.checked) state.on.add(name); else state.on.delete(name);
            draw();
          });
          const th = element("th", { scope: "row" }, line);
          const key = element("svg", { viewBox: "0 0 1.6 0.5", class: "mtl-key",
            "aria-hidden": "true" }, th);
          arrow(element("g", { transform: "translate(0.05 0.25)" }, key), [1.5, 0], color, dash, 0.07);
          th.append(` ${title}`);
          for (let i = 0; i < 4; i += 1) element("td", {}, line);
        });
      }
      Object.entries(methods).forEach(([name, { promise, holds }]) => {
        const { weights, direction } = found[name];
        const cells = body.querySelector(`[data-method=${name}]`).querySelectorAll("td");
        const gains = state.g.map((x) => dot(x, direction));
        const kept = holds(state.g, direction, weights);
        cells[1].textContent = weights.map(shown).join("  ");
        cells[2].textContent = gains
          .map((x) => `${shown(x)} ${x > 0.005 ? "▼" : x < -0.005 ? "▲" : "="}`).join("  ");
        cells[3].textContent = kept === null ? "–" : kept ? "holds" : "fails";
        cells[4].textContent = promise;
      });
    }

    function draw() {
      const found = {};
      Object.keys(rules).forEach((name) => { found[name] = rules[name](state.g); });
      drawPlane(found);
      drawHandles();
      drawTable(found);
      const conflicts = pairs(state.k).filter(([k, l]) => dot(state.g[k], state.g[l]) < 0);
      const told = conflicts.map(([k, l]) => `${k + 1} and ${l + 1}`).join(", ");
      status.textContent = (told ? `In conflict: tasks ${told}. ` : "No two tasks are in conflict. ")
        + (descentCone(state.g) ? "The shaded steps lower all losses."
          : "No step lowers all losses: the point is Pareto stationary.");
    }

    draw();
  }

  function run() {
    const box = document.getElementById("mtl-rules");
    if (box) start(box);
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", run);
  else run();
}());
