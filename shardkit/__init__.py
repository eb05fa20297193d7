"""Reshard any Hugging Face checkpoint without loading it, and measure what that does to its load.

Names are imported when they are first used (`__init__.pyi` lists them): `import shardkit` brings in neither
torch nor transformers, matplotlib or ipywidgets.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
