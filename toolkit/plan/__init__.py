"""What a run takes, before it is started: memory of each rank by part, bytes of collectives, seconds of a step.

Of settings and configurations alone. It imports settings and tables, and of divergences what divides a loss into tiles.
"""

from toolkit.plan.machine import DEVICES, Device, Machine
from toolkit.plan.plan import Advice, Plan, plan_of, plan_run
from toolkit.plan.shape import ModelShape

__all__ = ["DEVICES", "Advice", "Device", "Machine", "ModelShape", "Plan", "plan_of", "plan_run"]
