"""The demonstration: one small language model trained by peers that come, go and get killed.

``python -m potluck.demo`` runs all of it on this machine; ``--host`` and ``--join`` train across machines.
"""
