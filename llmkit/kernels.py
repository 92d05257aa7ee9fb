"""Kernels: attention, cross-entropy and row-wise steps, one function for each, whatever the machine.

They stand in kernels/, at the top level for its readers, and know nothing of models, tokenizers or training. kernels/
has no __init__.py: in a clone, Python would take it for the package `kernels` of PyPI, which transformers looks for.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
# a clone has kernels/ beside llmkit/, a wheel llmkit/kernels/; this module, found before a folder of its name, is the
# package of either
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "kernels")]
