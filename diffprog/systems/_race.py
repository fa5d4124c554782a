from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._car import AbstractCar, Car
from ._system import AbstractSystem, ControlBounds, Scalar
from ._track import right_normal, Track


class PathTracking(AbstractSystem):
    r"""A car that follows a point running along the center line at constant speed.

    $$h_t = \|(x, y) - c(s)\|^2 + \lambda \|u\|^2, \qquad \dot s = v_{ref}$$

    State: that of the car, relative to the origin of the track, and the parameter s [m]
    of the point, shape `(n+1,)`; control: that of the car, shape `(2,)`, with its
    limits. Since the point is part of the state, no cost depends on the stage, and a
    controller may start anywhere.

    Source: V. Roulet, S. Srinivasa, M. Fazel, Z. Harchaoui, "Iterative Linear
    Quadratic Optimization for Nonlinear Control: Differentiable Programming
    Algorithmic Templates", 2022, arXiv:2207.06362; the defaults are its numbers.
    """

    car: AbstractCar
    track: Track
    dt: Scalar = 0.04
    v_ref: Scalar = 3.0
    v_start: Scalar = 1.0
    control_weight: Scalar | Float[Array, " 2"] = 1e-6
    method: Any = eqx.field(static=True, default="euler")

    def __check_init__(self):
        _check_parts(self)

    def start(
        self, speed: Scalar | None = None, s: Scalar = 0.0
    ) -> Float[Array, " state"]:
        """The state on the center line at `s` [m], with `speed` (`v_start`) [m/s]."""
        speed = self.v_start if speed is None else speed
        return jnp.append(_on_track(self.car, self.track, speed, s), s)

    @property
    def x0(self) -> Float[Array, " state"]:
        """On the center line at s = 0, with the speed `v_start`."""
        return self.start()

    @property
    def control_bounds(self) -> ControlBounds:
        """Those of the car, or `None`."""
        return self.car.control_bounds

    def vector_field(self, x, u, t):
        point_speed = jnp.full_like(x[-1:], self.v_ref)
        return jnp.concatenate([self.car.vector_field(x[:-1], u, t), point_speed])

    def cost(self, x, u, t):
        return self.terminal_cost(x) + jnp.sum(self.control_weight * u**2)

    def terminal_cost(self, x: Float[Array, " state"]) -> Float[Array, ""]:
        """The cost of the last state: the squared distance from the point."""
        return jnp.sum((x[:2] - self.track.center(x[-1])) ** 2)


PathTracking.__init__.__doc__ = """**Arguments:**

- `car`: the vehicle, any [`diffprog.systems.AbstractCar`][].
- `track`: a [`diffprog.systems.Track`][].
- `dt`: duration of a stage [s].
- `v_ref`: speed of the point [m/s].
- `v_start`: speed of the car in `x0` [m/s].
- `control_weight`: weight of the squared control, one for both inputs or for each.
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""


class Race(AbstractSystem):
    r"""A car that drives along a track as fast as `v_ref` and its borders allow.

    The state of the car is extended by the progress s on the center line [m] and its
    rate, the control by the acceleration of s: it is up to the optimizer to keep the
    point c(s) beside the car. With $\psi$ the heading of the center line at s,

    $$e_c = \sin\psi \, (x - c_x) - \cos\psi \, (y - c_y), \qquad
    e_l = -\cos\psi \, (x - c_x) - \sin\psi \, (y - c_y),$$
    $$h_x = q_C e_c^2 + q_L e_l^2 + q_V \Delta^2 (\dot s - v_{ref})^2
    - \beta \log \dot s + q_B \left[(-m_{left})_+^\kappa + (-m_{right})_+^\kappa\right],
    \qquad h_u = \lambda \|u\|^2,$$

    with m the distances between the sides of the car and the borders, less `margin`. A
    rate of the progress that is not positive makes the cost NaN, which a solver
    rejects. Positions are relative to the origin of the track.

    State: car, s, rate of s, shape `(n+2,)`; control: car, acceleration of s [m/s^2],
    shape `(3,)`. The control weight counts for the inputs of the car and
    `progress_weight` for the acceleration of s. Where the inputs of the car are not
    squashed, a problem made by [`diffprog.ControlProblem.from_system`][] keeps their
    limits, `control_bounds`. Zeros are then a car that rolls to a stop, where the model
    ends: begin in the middle between the limits, which zeros are for a squashed car.
    `borders` are for constraints, in place of their cost.

    Sources: A. Liniger, A. Domahidi, M. Morari, "Optimization-based autonomous racing
    of 1:43 scale RC cars", 2015, arXiv:1711.07300, for the cost; V. Roulet, S.
    Srinivasa, M. Fazel, Z. Harchaoui, "Iterative Linear Quadratic Optimization for
    Nonlinear Control", 2022, arXiv:2207.06362, for the soft borders and the defaults.
    """

    car: AbstractCar
    track: Track
    dt: Scalar = 0.02
    v_ref: Scalar = 3.0
    v_start: Scalar = 1.0
    q_contour: Scalar = 0.1
    q_lag: Scalar = 10.0
    q_speed: Scalar = 0.1
    q_border: Scalar = 100.0
    q_log: Scalar = 1e-6
    control_weight: Scalar | Float[Array, " 2"] = 1e-6
    progress_weight: Scalar = 1e-6
    margin: Scalar = 0.0
    border_power: int = eqx.field(static=True, default=3)
    method: Any = eqx.field(static=True, default="rk4")

    def __check_init__(self):
        _check_parts(self)

    @classmethod
    def miniature(
        cls,
        track: Track,
        *,
        dt: Scalar = 0.02,
        v_ref: Scalar = 3.0,
        squashed: bool = True,
    ) -> "Race":
        """The 1:43 car with the published weights.

        **Arguments:**

        - `track`: a miniature track, about 0.4 m wide.
        - `dt`: duration of a stage [s].
        - `v_ref`: desired rate of the progress [m/s].
        - `squashed`: as in [`diffprog.systems.Car`][].
        """
        return cls(Car.miniature(squashed=squashed), track, dt=dt, v_ref=v_ref)

    @classmethod
    def full_size(
        cls,
        track: Track,
        *,
        dt: Scalar = 0.1,
        v_ref: Scalar = 30.0,
        squashed: bool = True,
    ) -> "Race":
        """The full-size race car, with weights for meters instead of centimeters.

        Long stages, so that a horizon of 50 sees the braking distance. A larger `v_ref`
        is faster and harder to solve for: the car may enter a corner too fast.

        **Arguments:**

        - `track`: a track about 10 m wide.
        - `dt`: duration of a stage [s], at most 0.1.
        - `v_ref`: desired rate of the progress [m/s].
        - `squashed`: as in [`diffprog.systems.Car`][].
        """
        return cls(
            Car.full_size(squashed=squashed),
            track,
            dt=dt,
            v_ref=v_ref,
            v_start=20.0,
            q_contour=1e-2,
            q_lag=1.0,
            q_speed=0.3,
            q_border=10.0,
            control_weight=0.1,
            progress_weight=1e-2,
            margin=0.25,
        )

    def start(
        self, speed: Scalar | None = None, s: Scalar = 0.0
    ) -> Float[Array, " state"]:
        """The state on the center line at `s` [m], with `speed` (`v_start`) [m/s]."""
        speed = self.v_start if speed is None else speed
        return jnp.append(
            _on_track(self.car, self.track, speed, s), jnp.array([s, speed])
        )

    @property
    def x0(self) -> Float[Array, " state"]:
        """On the center line at s = 0, with the speed `v_start`."""
        return self.start()

    @property
    def control_bounds(self) -> ControlBounds:
        """Those of the car, and none for the acceleration of s; or `None`."""
        limits = self.car.control_bounds
        if limits is None:
            return None
        return jnp.append(limits[0], -jnp.inf), jnp.append(limits[1], jnp.inf)

    def vector_field(self, x, u, t):
        progress = jnp.stack([x[-1], u[-1]])
        return jnp.concatenate([self.car.vector_field(x[:-2], u[:-1], t), progress])

    def cost(self, x, u, t):
        control = jnp.sum(self.control_weight * u[:-1] ** 2)
        return self.terminal_cost(x) + control + self.progress_weight * u[-1] ** 2

    def terminal_cost(self, x: Float[Array, " state"]) -> Float[Array, ""]:
        """The cost of the last state, equal to the part h_x of a stage."""
        contour, lag = self._errors(x)
        rate = x[-1]
        error = self.q_contour * contour**2 + self.q_lag * lag**2
        speed = self.q_speed * self.dt**2 * (rate - self.v_ref) ** 2
        outside = jnp.maximum(self.borders(x), 0.0)
        border = self.q_border * jnp.sum(outside**self.border_power)
        return error + speed - self.q_log * jnp.log(rate) + border

    def lateral_error(self, x: Float[Array, " state"]) -> Float[Array, ""]:
        """The distance from the center line [m], positive to the right."""
        return self._errors(x)[0]

    def border_margin(self, x: Float[Array, " state"]) -> Float[Array, ""]:
        """The distance from the side of the car to the nearest border [m].

        The m of the cost, before `margin` is taken off: measured at right angles to
        the borders beside the progress s, positive inside.
        """
        return jnp.min(self._margins(x))

    def borders(self, x, u=None, t=None):
        """`margin` less the distances to the left and the right border [m].

        At most 0 where the car is on the track: `dp.Inequality(race.borders)`, at the
        stages and at the end, with `q_border=0.0`, keeps it there. The first state is
        given and no control changes it, so its rows are -1.
        """
        rows = self.margin - self._margins(x)
        return rows if t is None else jnp.where(t == 0, -1.0, rows)

    def _errors(self, x):
        # e_c along the normal of the center line, e_l against its direction.
        points, slopes = self.track.lines(x[-2])
        normal = right_normal(slopes[0])
        offset = x[:2] - points[0]
        contour = normal[0] * offset[0] + normal[1] * offset[1]
        lag = normal[1] * offset[0] - normal[0] * offset[1]
        return contour, lag

    def _margins(self, x):
        # (z - left).n_left - w/2 and (right - z).n_right - w/2
        points, slopes = self.track.lines(x[-2])
        normals = right_normal(slopes)
        to_right = jnp.sum((x[:2][None] - points) * normals, axis=-1)
        return jnp.stack([to_right[1], -to_right[2]]) - self.car.width / 2


Race.__init__.__doc__ = """**Arguments:**

- `car`: the vehicle, any [`diffprog.systems.AbstractCar`][].
- `track`: a [`diffprog.systems.Track`][].
- `dt`: duration of a stage [s].
- `v_ref`: desired rate of the progress [m/s].
- `v_start`: speed of the car in `x0` [m/s].
- `q_contour`, `q_lag`: weights of the errors across and along the center line.
- `q_speed`: weight of the squared distance lost to `v_ref` in a stage.
- `q_border`: weight of a border crossed, to the power `border_power`.
- `q_log`: weight beta that keeps the rate of the progress positive.
- `control_weight`: weight of the squared inputs of the car, one for both or for each.
- `progress_weight`: weight of the squared acceleration of the progress.
- `margin`: distance to keep between the car and a border [m].
- `border_power`: the power kappa, at least 2 (a smooth second derivative needs 3).
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""


def _on_track(car, track, speed, s):
    return car.state(track.center(s), track.heading(s), speed)


def _check_parts(race: Any):
    for name, kind, example in (
        ("car", AbstractCar, "`dp.systems.Car.miniature()`"),
        ("track", Track, "`dp.systems.Track.simple()`"),
    ):
        part = getattr(race, name)
        if not isinstance(part, kind):
            came = f"the class {part.__name__}" if isinstance(part, type) else f"{part}"
            raise TypeError(
                f"`{name}` is {came:.200}; something like {example} is expected."
            )
