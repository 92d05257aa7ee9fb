"""Kernels: attention, cross-entropy and row-wise steps, one function for each on every machine.

They are in kernels/, at the top level for readers, and independent of models, tokenizers and training. kernels/ has no
__init__.py, or Python would take it in a clone for the package `kernels` of PyPI, which transformers looks for.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
# a clone has kernels/ next to llmkit/, a wheel has llmkit/kernels/; this module, which is found before a folder of its
# name, is the package of either
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "kernels")]
