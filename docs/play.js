// The page that moves. Dynamics and costs are those of docs/programs/play.py, which wrote
// the plans of play-data.js: here they are rolled out, and drawn.
(() => {
  const numbers = (text) =>
    new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const clamp = (value, [lo, hi]) => Math.min(Math.max(value, lo), hi);

  // The cell of a grid that a value lies in, and where in it, from 0 to 1.
  const cell = (grid, value) => {
    const step = grid[1] - grid[0];
    const at = clamp((value - grid[0]) / step, [0, grid.length - 1]);
    const i = Math.min(Math.floor(at), grid.length - 2);
    return [i, at - i];
  };
  const corners = (a, b) => [[a, b], [a + 1, b], [a, b + 1], [a + 1, b + 1]];

  // x_{t+1} = step(x_t, u_t) with u_t = control(t, x_t), and the cost of all stages.
  const rollout = (system, x0, control) => {
    const xs = [x0], us = [], costs = [];
    for (let t = 0; t < system.horizon; t++) {
      const u = control(t, xs[t]);
      costs.push(system.cost(xs[t], u));
      us.push(u);
      xs.push(system.step(xs[t], u));
    }
    costs.push(system.terminalCost(xs[system.horizon]));
    return { xs, us, cost: sum(costs) };
  };

  const cheapest = (found) => found.reduce((a, b) => (b.cost < a.cost ? b : a));

  const pendulum = (() => {
    const { dt, gravity, friction, angles, velocities, plans, costs } = PLAY.pendulum;
    const data = numbers(plans), horizon = 60;
    const system = {
      horizon,
      costs: numbers(costs),
      step: ([angle, velocity], [u]) => [
        angle + dt * velocity,
        velocity + dt * (u - friction * velocity - gravity * Math.sin(angle)),
      ],
      cost: ([angle, velocity], [u]) =>
        0.05 * (angle - Math.PI) ** 2 + 0.005 * velocity ** 2 + 0.025 * u ** 2,
      terminalCost: ([angle, velocity]) =>
        50 * (angle - Math.PI) ** 2 + 5 * velocity ** 2,
    };
    const row = (i, j, t) => {
      const at = ((i * velocities.length + j) * horizon + t) * 3;
      return data.subarray(at, at + 3);
    };
    // A stored plan, and the same plan from another start, with its gains.
    system.stored = (i, j) =>
      rollout(system, [angles[i], velocities[j]], (t) => [row(i, j, t)[0]]);
    const follow = (x0, i, j) => {
      const { xs } = system.stored(i, j);
      return rollout(system, x0, (t, x) => {
        const [u, a, b] = row(i, j, t);
        return [u + a * (x[0] - xs[t][0]) + b * (x[1] - xs[t][1])];
      });
    };
    const turned = ({ xs, us, cost }) => ({
      xs: xs.map(([a, v]) => [-a, -v]), us: us.map(([u]) => [-u]), cost,
    });
    // Up on the right or on the left, along the best of the plans around the start.
    system.plan = ([angle, velocity]) =>
      cheapest([1, -1].map((side) => {
        const x0 = [side * angle, side * velocity];
        const at = corners(cell(angles, x0[0])[0], cell(velocities, x0[1])[0]);
        const best = cheapest(at.map(([i, j]) => follow(x0, i, j)));
        return side === 1 ? best : turned(best);
      }));
    return system;
  })();

  const car = (() => {
    const { dt, goal, radius, weight, start, xs, ys, plans, costs } = PLAY.car;
    const data = numbers(plans), horizon = 50;
    const at = (i, j, t, k) => data[((i * ys.length + j) * horizon + t) * 2 + k];
    const system = {
      horizon,
      goal,
      radius,
      costs: numbers(costs),
      step: ([x, y, heading, speed], [turn, push]) => [
        x + dt * speed * Math.cos(heading),
        y + dt * speed * Math.sin(heading),
        heading + dt * speed * turn,
        speed + dt * push,
      ],
      terminalCost: ([x, y, heading, speed]) =>
        50 * ((x - goal[0]) ** 2 + (y - goal[1]) ** 2) +
        5 * (heading ** 2 + (speed - 1) ** 2),
    };
    const among = ([a, b]) => ({
      ...system,
      cost: ([x, y], [turn, push]) =>
        0.05 * (turn ** 2 + push ** 2) +
        weight * Math.max(radius ** 2 - (x - a) ** 2 - (y - b) ** 2, 0) ** 2,
    });
    system.stored = (i, j) =>
      rollout(among([xs[i], ys[j]]), start, (t) => [at(i, j, t, 0), at(i, j, t, 1)]);
    // The controls of the places around, or their mean by distance: what is cheapest.
    system.plan = (place) => {
      const [i, p] = cell(xs, place[0]), [j, q] = cell(ys, place[1]);
      const shares = [(1 - p) * (1 - q), p * (1 - q), (1 - p) * q, p * q];
      const around = corners(i, j), problem = among(place);
      const mean = (t) => [0, 1].map((k) =>
        sum(around.map(([a, b], n) => shares[n] * at(a, b, t, k))));
      const single = around.map(([a, b]) => (t) => [at(a, b, t, 0), at(a, b, t, 1)]);
      return cheapest([mean, ...single].map((us) => rollout(problem, start, us)));
    };
    return system;
  })();

  // A canvas with coordinates, a point of which can be dragged, or moved by arrows. A
  // finger drags it from where it is, and elsewhere scrolls the page.
  const board = (id, range, held, paint, moved) => {
    const canvas = document.getElementById(id), context = canvas.getContext("2d");
    const color = (name) => getComputedStyle(document.body).getPropertyValue(name);
    const view = {
      context,
      width: 0,
      height: 0,
      to: ([x, y]) => [
        ((x - range.x[0]) / (range.x[1] - range.x[0])) * view.width,
        ((range.y[1] - y) / (range.y[1] - range.y[0])) * view.height,
      ],
      line: (points, style, width = 2) => {
        context.beginPath();
        points.forEach((p) => context.lineTo(...view.to(p)));
        context.strokeStyle = style;
        context.lineWidth = width;
        context.stroke();
      },
      disc: (p, pixels, style) => {
        context.beginPath();
        context.arc(...view.to(p), pixels, 0, 2 * Math.PI);
        context.fillStyle = style;
        context.fill();
      },
      text: (words, p, align = "left") => {
        context.font = "13px sans-serif";
        context.textAlign = align;
        context.fillStyle = view.faint;
        context.fillText(words, ...view.to(p));
      },
      scale: () => view.width / (range.x[1] - range.x[0]),
    };
    view.draw = () => {
      const ratio = window.devicePixelRatio || 1;
      [view.width, view.height] = [canvas.clientWidth, canvas.clientHeight];
      canvas.width = view.width * ratio;
      canvas.height = view.height * ratio;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      view.ink = color("--md-default-fg-color");
      view.faint = color("--md-default-fg-color--light");
      view.grid = color("--md-default-fg-color--lightest");
      view.accent = color("--md-typeset-a-color");
      paint(view);
    };
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width;
      const y = (event.clientY - box.top) / box.height;
      return [
        range.x[0] + x * (range.x[1] - range.x[0]),
        range.y[1] - y * (range.y[1] - range.y[0]),
      ];
    };
    let dragged = false;
    const near = (event) => {
      const box = canvas.getBoundingClientRect(), [x, y] = view.to(held());
      return Math.hypot(event.clientX - box.left - x, event.clientY - box.top - y) < 40;
    };
    const touched = (event) => {
      if (near(event.touches[0])) event.preventDefault();
    };
    canvas.addEventListener("touchstart", touched, { passive: false });
    canvas.addEventListener("click", (event) => moved(point(event)));
    canvas.addEventListener("pointerdown", (event) => {
      dragged = event.pointerType !== "touch" || near(event);
      if (!dragged) return;
      canvas.setPointerCapture(event.pointerId);
      moved(point(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (dragged) moved(point(event));
    });
    for (const end of ["pointerup", "pointercancel"])
      canvas.addEventListener(end, () => (dragged = false));
    const arrows = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1],
    };
    canvas.addEventListener("keydown", (event) => {
      const arrow = arrows[event.key];
      if (arrow) {
        event.preventDefault();
        moved(null, arrow);
      }
    });
    return view;
  };

  const state = {
    swing: { start: [0, 0], ...pendulum.plan([0, 0]) },
    drive: { obstacle: [2.9, 0.3], ...car.plan([2.9, 0.3]) },
    time: 0,
  };
  const show = (id, words) => (document.getElementById(id).textContent = words);

  const setStart = ([angle, velocity]) => {
    const start = [clamp(angle, [-Math.PI, Math.PI]), clamp(velocity, [-6, 6])];
    state.swing = { start, ...pendulum.plan(start) };
    state.time = 0;
    refresh();
  };
  const setObstacle = (place) => {
    const { xs, ys } = PLAY.car;
    const ends = (grid) => [grid[0], grid[grid.length - 1]];
    const obstacle = [clamp(place[0], ends(xs)), clamp(place[1], ends(ys))];
    state.drive = { obstacle, ...car.plan(obstacle) };
    state.time = 0;
    refresh();
  };

  const now = ({ xs }) => xs[Math.min(Math.floor(state.time), xs.length - 1)];
  const bob = (angle) => [Math.sin(angle), -Math.cos(angle)];

  const plane = board(
    "play-plane",
    { x: [-3.6, 3.6], y: [-11, 11] },
    () => state.swing.start,
    (view) => {
      view.line([[-3.6, 0], [3.6, 0]], view.grid, 1);
      for (const a of [-Math.PI, 0, Math.PI]) view.line([[a, -11], [a, 11]], view.grid, 1);
      view.text("hanging", [0.1, -10.4]);
      view.text("upright", [3.05, -10.4], "right");
      view.text("angular velocity", [-3.0, 10]);
      view.text("angle", [3.05, -1.4], "right");
      view.line(state.swing.xs, view.accent, 2.5);
      view.disc(state.swing.start, 9, view.accent);
      view.disc(now(state.swing), 5, view.ink);
    },
    (point, arrow) => {
      const [angle, velocity] = state.swing.start;
      setStart(point || [angle + 0.1 * arrow[0], velocity + 0.25 * arrow[1]]);
    },
  );
  const swing = board(
    "play-swing",
    { x: [-1.3, 1.3], y: [-1.3, 1.3] },
    () => bob(state.swing.start[0]),
    (view) => {
      view.line(state.swing.xs.map(([angle]) => bob(angle)), view.grid, 6);
      const start = bob(state.swing.start[0]), at = bob(now(state.swing)[0]);
      view.line([[0, 0], start], view.grid, 3);
      view.disc(start, 12, view.accent);
      view.line([[0, 0], at], view.ink, 3);
      view.disc(at, 8, view.ink);
      view.disc([0, 0], 4, view.ink);
    },
    (point, arrow) => {
      const [angle, velocity] = state.swing.start;
      if (arrow) setStart([angle + 0.1 * arrow[0], velocity + 0.25 * arrow[1]]);
      else setStart([Math.atan2(point[0], -point[1]), velocity]);
    },
  );
  const road = board(
    "play-road",
    { x: [-0.6, 6.6], y: [-2.4, 2.4] },
    () => state.drive.obstacle,
    (view) => {
      const { obstacle, xs } = state.drive;
      view.disc(obstacle, car.radius * view.scale(), view.grid);
      view.disc(obstacle, 0.75 * view.scale(), view.faint);
      view.line(xs, view.accent, 2.5);
      view.disc([0, 0], 5, view.ink);
      view.text("start", [-0.1, -0.35], "center");
      view.disc(car.goal, 5, view.ink);
      view.text("goal", [car.goal[0] + 0.1, car.goal[1] - 0.35], "center");
      const [x, y, heading] = now(state.drive);
      const side = ([a, b]) => [
        x + a * Math.cos(heading) - b * Math.sin(heading),
        y + a * Math.sin(heading) + b * Math.cos(heading),
      ];
      view.line([[-0.15, 0], [0.2, 0]].map(side), view.ink, 10);
    },
    (point, arrow) => {
      const [x, y] = state.drive.obstacle;
      setObstacle(point || [x + 0.1 * arrow[0], y + 0.1 * arrow[1]]);
    },
  );

  const draw = () => [plane, swing, road].forEach((view) => view.draw());
  const refresh = () => {
    const [angle, velocity] = state.swing.start;
    show(
      "play-swing-cost",
      `start ${angle.toFixed(2)} rad, ${velocity.toFixed(2)} rad/s: ` +
        `cost ${state.swing.cost.toFixed(2)}`,
    );
    const [x, y] = state.drive.obstacle;
    show(
      "play-road-cost",
      `obstacle at ${x.toFixed(2)}, ${y.toFixed(2)} m: ` +
        `cost ${state.drive.cost.toFixed(2)}`,
    );
    draw();
  };

  let last = null;
  const tick = (milliseconds) => {
    if (last !== null) state.time += (milliseconds - last) / 50;
    if (state.time > 90) state.time = 0; // stands still for a while at the end
    last = milliseconds;
    draw();
    requestAnimationFrame(tick);
  };
  refresh();
  new MutationObserver(draw).observe(document.body, { attributes: true });
  new ResizeObserver(draw).observe(document.getElementById("play-plane"));
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches)
    requestAnimationFrame(tick);
  window.play = { pendulum, car, state };
})();
