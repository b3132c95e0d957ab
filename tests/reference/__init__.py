"""Slow, obvious reference implementation of MoECa, written apart from the product so that it can judge it.

Plain Python over samples, tokens and branches; nothing here imports the product's policies, passes or ops.
"""
