"""Engines by name. A new engine (vllm, api) is a module and one entry here."""

from collections.abc import Callable
from pathlib import Path

from candor.errors import UserError, nearest
from serve.config import EngineConfig
from serve.engine import Engine


def _open_torch(config: EngineConfig, base: Path, adapter: Path | None) -> Engine:
    import torch

    from serve.torch_engine import TorchEngine

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return TorchEngine(base, adapter, device=config.device, dtype=config.dtype, batch_tokens=config.batch_tokens)


_OPENERS: dict[str, Callable[[EngineConfig, Path, Path | None], Engine]] = {"torch": _open_torch}


def open_engine(config: EngineConfig, base: Path, adapter: Path | None) -> Engine:
    """The engine that the configuration names, with one variant loaded."""
    if config.name not in _OPENERS:
        raise UserError(f"engine.name is {config.name!r}; {nearest(config.name, _OPENERS)}")
    return _OPENERS[config.name](config, base, adapter)
