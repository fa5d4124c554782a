from .door import layerwise_lqr as layerwise_lqr
from .recursion import LayerwiseLQR as LayerwiseLQR
