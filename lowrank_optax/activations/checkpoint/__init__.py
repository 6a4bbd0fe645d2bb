"""One function under a policy: actions, their codecs, and the replay that reads them.

From the ground up: ``codecs``, ``actions``, ``policy``, ``program``, ``replay``.
"""
