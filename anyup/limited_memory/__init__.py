"""How a call stays within a budget of memory: what is kept, what is computed again, and what that costs.

What is kept is whole maps where they fit; else, for as many rows of the image as fit, one map: the trunk of whichever
encoder is at work (the passes of the key and the query encoder one after the other), or, where less than about half of
the rows have room, the encoded image (their passes side by side, because what keeps nothing is then encoded half as
often).
"""

from anyup.limited_memory.choice import BudgetError, choose, plan, rows_at_once
from anyup.limited_memory.plans import Plan, Stage
from anyup.limited_memory.task import Task

__all__ = ["BudgetError", "Plan", "Stage", "Task", "choose", "plan", "rows_at_once"]
