"""Planning: search for the actions whose imagined result is nearest to a goal.

search.py: the methods, on any function of cost. plan.py: roll-outs and costs of a world model, and
the jitted plan. policy.py: a plan that is called step by step, NumPy in and out. This room knows
models/base and models/acting alone.
"""
