"""Policies for a stack of layers: costs, errors, an integer program, and its plans.

From the ground up: ``audit``, ``hardware``, ``operations``, ``costs``, ``probes``,
``plan``, ``milp`` (the only file that imports scipy), ``predict``, ``choose``,
``adaptive``.
"""
