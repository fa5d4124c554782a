"""Ready-made systems: models, costs and tracks for `dp.ControlProblem.from_system`."""

from ._arm import Arm as Arm
from ._car import (
    AbstractCar as AbstractCar,
    Car as Car,
    Drivetrain as Drivetrain,
    KinematicCar as KinematicCar,
    Tire as Tire,
)
from ._cart_pole import CartPole as CartPole
from ._pendulum import Pendulum as Pendulum
from ._quadrotor import (
    Quadrotor as Quadrotor,
    QuaternionQuadrotor as QuaternionQuadrotor,
)
from ._race import PathTracking as PathTracking, Race as Race
from ._track import Track as Track
