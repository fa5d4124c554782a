"""Ready-made manifolds, for states of which differences are no subtractions.

[`diffprog.AbstractManifold`][] says what a manifold is; one of your own is a class, or
[`diffprog.Manifold`][] of two functions.
"""

from ._chain.manifolds import (
    Angle as Angle,
    Blocks as Blocks,
    Euclidean as Euclidean,
    Product as Product,
    UnitQuaternion as UnitQuaternion,
)
