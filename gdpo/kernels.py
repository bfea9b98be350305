"""`gdpo.kernels`: the fused attribute reward and GDPO loss. The code is in the top-level folder `kernels/`.

A package named `kernels` must not be importable from the project root, because transformers and diffusers probe the
Hugging Face package of that name. So the folder has no `__init__.py` (a regular package elsewhere on the path wins),
and this module acts as the package: its `__path__` is the installed copy `gdpo/_kernels` or the checkout's folder.
Names are resolved on first use (PEP 562), so that importing this module loads neither torch nor triton.
"""

from importlib import import_module
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels") if p.is_dir()][:1]

_HOME = {
    "complexity_map": "complexity",
    "attribute_ratios": "complexity",
    "attribute_statistics": "statistics",
    "AttributeStatistics": "statistics",
    "attribute_reward": "reward",
    "group_scores": "reward",
    "gdpo_loss": "loss",
    "group_norm": "norm",
    "geglu": "gate",
    "residual_sum": "residual",
    "use_triton": "dispatch",
}
__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'gdpo.kernels' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(f"gdpo.kernels.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
