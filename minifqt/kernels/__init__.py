"""The arithmetic. Read reference.py first.

Layers import gemm, conv, norm and pool, which pick the fast version.
"""
