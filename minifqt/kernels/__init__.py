"""The arithmetic. Read reference.py first; layers import gemm, conv, norm and pool, which pick the fast version."""
