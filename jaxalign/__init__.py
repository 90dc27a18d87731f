"""jaxalign: align language models in JAX.

`jaxalign.run(config)` trains as `python -m jaxalign.train --config=...` does. Everything is imported when it is used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from jaxalign.train import run

        return run
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")
