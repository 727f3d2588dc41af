"""
A fleet of devices, simulated: the server's own federation decides, everything around it is a model with stated distributions.

`plan.py` says what is simulated and where each number comes from, `events.py` is the discrete-event simulation, `device.py` one
device's way through a run, `traffic.py` sizes of messages, `cost.py` measures what the federation costs.
"""

from .events import RunStuck, SimulationFault, simulate
from .plan import Fleet, Plan, PlanError, Server
from .result import Result

__all__ = ["Fleet", "Plan", "PlanError", "Result", "RunStuck", "Server", "SimulationFault", "simulate"]
