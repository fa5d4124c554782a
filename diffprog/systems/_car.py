import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._system import ControlBounds, Scalar, Time


class AbstractCar(eqx.Module):
    """A vehicle in the plane. Its state begins with the position (x, y).

    - `length`, `width`: outer dimensions [m].
    """

    length: eqx.AbstractVar[Scalar]
    width: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def vector_field(
        self, x: Float[Array, " n"], u: Float[Array, " 2"], t: Time
    ) -> Float[Array, " n"]:
        """The time derivative of the state under the control (drive, steer)."""

    @abc.abstractmethod
    def state(
        self, position: Float[Array, " 2"], heading: Float[Array, ""], speed: Scalar
    ) -> Float[Array, " n"]:
        """The state of the car that runs straight ahead."""

    @property
    @abc.abstractmethod
    def control_bounds(self) -> ControlBounds:
        """The least and the largest control, each of shape `(2,)`; `None` for none."""


class KinematicCar(AbstractCar):
    r"""A car whose wheels do not slip.

    $$\dot x = v \cos\varphi, \quad \dot y = v \sin\varphi, \quad
    \dot\varphi = v \tan(\delta) / L, \quad \dot v = a$$

    State: position (x, y) [m], heading [rad], speed [m/s], shape `(4,)`; the position
    is that of the rear axle. Control: acceleration a [m/s^2] and steer, shape `(2,)`.
    The angle of the wheels is `(2/pi) max_steer arctan(steer)`. With `squashed` false
    it is `max_steer steer`, and `control_bounds` keep steer between -1 and 1.
    """

    wheelbase: Scalar = 0.09
    max_steer: Scalar = math.pi / 3
    length: Scalar = 0.09
    width: Scalar = 0.045
    squashed: bool = eqx.field(static=True, default=True)

    def vector_field(self, x, u, t):
        _, _, heading, speed = x
        acceleration, steer = u
        angle = _steering(steer, self.max_steer, self.squashed)
        return jnp.stack(
            [
                speed * jnp.cos(heading),
                speed * jnp.sin(heading),
                speed * jnp.tan(angle) / self.wheelbase,
                acceleration,
            ]
        )

    def state(self, position, heading, speed):
        return _join(position, heading, speed)

    @property
    def control_bounds(self) -> ControlBounds:
        """The limits of acceleration (none) and steer; `None` where it is squashed."""
        return None if self.squashed else (_row(-math.inf, -1.0), _row(math.inf, 1.0))


KinematicCar.__init__.__doc__ = """**Arguments:**

- `wheelbase`: distance L between the axles [m].
- `max_steer`: limit of the angle of the wheels [rad], below pi/2.
- `length`, `width`: outer dimensions [m].
- `squashed`: whether the steer input is unbounded and squashed, or has limits.
"""


class Tire(eqx.Module):
    r"""The lateral force of an axle, $F(\alpha) = D \sin(C \arctan(B \alpha))$.

    Source: H. Pacejka, "Tire and Vehicle Dynamics", 2012, the Magic Formula without its
    curvature factor E.
    """

    stiffness: Scalar
    shape: Scalar
    peak: Scalar

    def force(self, slip: Float[Array, ""]) -> Float[Array, ""]:
        """The force [N] at a slip angle [rad]."""
        return self.peak * jnp.sin(self.shape * jnp.arctan(self.stiffness * slip))


Tire.__init__.__doc__ = """**Arguments:**

- `stiffness`: the factor B [1/rad].
- `shape`: the factor C; above 1 the force has its peak at a finite slip angle.
- `peak`: the largest force D [N].
"""


class Drivetrain(eqx.Module):
    r"""The longitudinal force, $F(d, v) = (C_1 - C_2 v) d - C_{r0} - C_{r2} v^2$.

    The duty d lies between `min_duty` and `max_duty`; a negative one brakes.
    """

    max_force: Scalar
    fade: Scalar
    rolling: Scalar
    drag: Scalar
    min_duty: Scalar
    max_duty: Scalar

    def duty(self, drive: Float[Array, ""]) -> Float[Array, ""]:
        """The duty of an unbounded input, with slope 1 in the middle of its range."""
        span = self.max_duty - self.min_duty
        return span * jax.nn.sigmoid(4 * drive / span) + self.min_duty

    def force(
        self, duty: Float[Array, ""], speed: Float[Array, ""]
    ) -> Float[Array, ""]:
        """The force [N] on the car, resistances included."""
        push = (self.max_force - self.fade * speed) * duty
        return push - self.rolling - self.drag * speed**2


Drivetrain.__init__.__doc__ = """**Arguments:**

- `max_force`: the force C_1 at standstill [N].
- `fade`: its loss C_2 per speed [N s/m].
- `rolling`: rolling resistance C_r0 [N].
- `drag`: drag C_r2 of the air [N s^2/m^2].
- `min_duty`, `max_duty`: range of the duty.
"""


class Car(AbstractCar):
    r"""A car with tire forces (dynamic bicycle model), driven at the rear axle.

    $$\alpha_f = \delta - \operatorname{atan2}(\omega l_f + v_y, v_x), \quad
    \alpha_r = \operatorname{atan2}(\omega l_r - v_y, v_x)$$
    $$m \dot v_x = F_x - F_f \sin\delta + m v_y \omega, \quad
    m \dot v_y = F_r + F_f \cos\delta - m v_x \omega, \quad
    I_z \dot\omega = l_f F_f \cos\delta - l_r F_r$$

    State: position (x, y) [m], heading [rad], forward and leftward velocity v_x, v_y of
    the center of mass [m/s], yaw rate [rad/s], shape `(6,)`. Control: drive and steer,
    shape `(2,)`, squashed to the duty of the drivetrain and to the angle
    `(2/pi) max_steer arctan(steer)`. With `squashed` false they are the duty itself and
    the share of `max_steer`, an angle of `max_steer steer`, and `control_bounds` keep
    them where squashing would: between `min_duty` and `max_duty`, and -1 and 1.
    (An angle in radians is a small number: damping, which counts all inputs alike,
    would hardly hold it.) Steering to the left is positive. The forces along and across
    an axle are independent (no friction ellipse). The model holds for v_x > 0 only.

    Source: A. Liniger, A. Domahidi, M. Morari, "Optimization-based autonomous racing of
    1:43 scale RC cars", 2015, arXiv:1711.07300.
    """

    mass: Scalar
    inertia: Scalar
    front: Scalar
    rear: Scalar
    front_tire: Tire
    rear_tire: Tire
    drivetrain: Drivetrain
    max_steer: Scalar
    length: Scalar
    width: Scalar
    squashed: bool = eqx.field(static=True, default=True)

    @classmethod
    def miniature(cls, *, squashed: bool = True) -> "Car":
        """The 1:43 car of the source above, up to about 3.5 m/s.

        Length and width are 1.5 times those of the source, as in V. Roulet, S.
        Srinivasa, M. Fazel, Z. Harchaoui, 2022, arXiv:2207.06362: a safety margin.
        """
        return cls(
            mass=0.041,
            inertia=27.8e-6,
            front=0.029,
            rear=0.033,
            front_tire=Tire(stiffness=2.579, shape=1.2, peak=0.192),
            rear_tire=Tire(stiffness=3.3852, shape=1.2691, peak=0.1737),
            drivetrain=Drivetrain(
                max_force=0.287,
                fade=0.0545,
                rolling=0.0518,
                drag=0.00035,
                min_duty=-0.1,
                max_duty=1.0,
            ),
            max_steer=math.pi / 3,
            length=0.09,
            width=0.045,
            squashed=squashed,
        )

    @classmethod
    def full_size(cls, *, squashed: bool = True) -> "Car":
        """A race car of 1200 kg and 230 kW, up to about 66 m/s.

        Source of the figures: A. Heilmeier et al., "Minimum curvature trajectory
        planning and control for an autonomous race car", Vehicle System Dynamics, 2020,
        and its repository TUMFTM/global_racetrajectory_optimization, file
        `params/racecar.ini`: mass, axle positions, dimensions, drag, rolling resistance
        (0.013 of the weight), largest drive force 7000 N, power 230 kW, steering limit,
        friction coefficient 1. Derived from them:

        - `inertia` m l_f l_r, the rule of thumb of a unit dynamic index;
        - `peak` of a tire: friction times the static load of its axle (no downforce);
        - `stiffness` and `shape`: the file has B = 10, C = 2.5 and E = 1; the shape 1.6
          gives the same force at large slip and B = 25 / 1.6 the same slope at 0;
        - `fade`: the force at 60 m/s is the power divided by that speed;
        - `min_duty`: brakes of 10500 N at low speed, nine tenths of the grip.
        """
        mass, gravity, front, rear = 1200.0, 9.81, 1.6, 1.4
        load = mass * gravity / (front + rear)
        return cls(
            mass=mass,
            inertia=mass * front * rear,
            front=front,
            rear=rear,
            front_tire=Tire(stiffness=25.0 / 1.6, shape=1.6, peak=load * rear),
            rear_tire=Tire(stiffness=25.0 / 1.6, shape=1.6, peak=load * front),
            drivetrain=Drivetrain(
                max_force=7000.0,
                fade=(7000.0 - 230e3 / 60.0) / 60.0,
                rolling=0.013 * mass * gravity,
                drag=0.75,
                min_duty=-1.5,
                max_duty=1.0,
            ),
            max_steer=0.35,
            length=4.7,
            width=2.0,
            squashed=squashed,
        )

    def tire_forces(
        self, x: Float[Array, " 6"], angle: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The lateral forces [N] of the front and rear axle; `angle` of the wheels."""
        _, _, _, vx, vy, rate = x
        front_slip = angle - jnp.arctan2(rate * self.front + vy, vx)
        rear_slip = jnp.arctan2(rate * self.rear - vy, vx)
        return self.front_tire.force(front_slip), self.rear_tire.force(rear_slip)

    def vector_field(self, x, u, t):
        _, _, heading, vx, vy, rate = x
        drive, steer = u
        duty = self.drivetrain.duty(drive) if self.squashed else drive
        angle = _steering(steer, self.max_steer, self.squashed)
        push = self.drivetrain.force(duty, vx)
        front, rear = self.tire_forces(x, angle)
        sin, cos = jnp.sin(heading), jnp.cos(heading)
        torque = self.front * front * jnp.cos(angle) - self.rear * rear
        return jnp.stack(
            [
                vx * cos - vy * sin,
                vx * sin + vy * cos,
                rate,
                (push - front * jnp.sin(angle)) / self.mass + vy * rate,
                (rear + front * jnp.cos(angle)) / self.mass - vx * rate,
                torque / self.inertia,
            ]
        )

    def state(self, position, heading, speed):
        return _join(position, heading, speed, 0.0, 0.0)

    @property
    def control_bounds(self) -> ControlBounds:
        """The limits of duty and steer; `None` where they are squashed."""
        if self.squashed:
            return None
        duties = self.drivetrain.min_duty, self.drivetrain.max_duty
        return _row(duties[0], -1.0), _row(duties[1], 1.0)


Car.__init__.__doc__ = """**Arguments:**

- `mass`: mass m [kg].
- `inertia`: moment of inertia I_z about the vertical axis [kg m^2].
- `front`, `rear`: distances l_f, l_r of the axles from the center of mass [m].
- `front_tire`, `rear_tire`: a [`diffprog.systems.Tire`][] per axle.
- `drivetrain`: a [`diffprog.systems.Drivetrain`][].
- `max_steer`: limit of the angle of the wheels [rad].
- `length`, `width`: outer dimensions [m].
- `squashed`: whether the inputs are unbounded and squashed, or have limits.
"""


def _steering(steer, max_steer, squashed):
    # Steer, unbounded or in [-1, 1] -> angle in [-max_steer, max_steer].
    return (
        2 / math.pi * max_steer * jnp.arctan(steer) if squashed else max_steer * steer
    )


def _join(position, *numbers):
    rest = [jnp.asarray(number, position.dtype) for number in numbers]
    return jnp.concatenate([position, jnp.stack(rest)])


def _row(*numbers):
    dtype = jnp.result_type(*numbers)
    return jnp.stack([jnp.asarray(number, dtype) for number in numbers])
