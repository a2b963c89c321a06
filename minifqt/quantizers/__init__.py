"""Quantizers, one file a family. Read base.py (the protocol, Identity, the registry), then psq.py.

bhq.py is the paper's best. `create("bhq", bits=4)` makes one; `@register("half")` adds your own,
usable at once as recipe("half4"); as `--recipe half4` too, if it is imported here.
"""
from minifqt.quantizers.base import Bound, Identity, Quantizer, create, names, parse, register
from minifqt.quantizers.bhq import BHQ
from minifqt.quantizers.psq import PSQ
from minifqt.quantizers.ptq import PTQ, IntegerZeroPTQ, Symmetric

__all__ = ["BHQ", "PSQ", "PTQ", "Bound", "Identity", "IntegerZeroPTQ", "Quantizer", "Symmetric",
           "create", "names", "parse", "register"]
