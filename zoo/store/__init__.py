"""The checkpoint store: ranks that agree before they act, and steps that are committed whole or not at all.

It imports no Lightning: a Fabric is anything with ``global_rank``, ``world_size`` and ``broadcast``.
"""
