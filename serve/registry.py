"""Engines by name. Each lives in a module of its own, imported only when it is asked for."""

from pathlib import Path

from candor.errors import UserError
from serve.config import EngineConfig
from serve.engine import Engine


def _open_torch(config: EngineConfig, base: Path, adapter: Path | None) -> Engine:
    import torch

    from serve.torch_engine import TorchEngine

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return TorchEngine(
        base,
        adapter,
        device=config.device,
        dtype=config.dtype,
        batch_tokens=config.batch_tokens,
        cuda_graphs=config.cuda_graphs,
    )


def _open_vllm(config: EngineConfig, base: Path, adapter: Path | None, n_rows: int | None) -> Engine:
    from serve.vllm_engine import open_vllm

    return open_vllm(config, base, adapter, n_rows=n_rows)


def _open_api(config: EngineConfig) -> Engine:
    from serve.api_engine import ApiEngine

    return ApiEngine(config)


def open_engine(config: EngineConfig, base: Path | None, adapter: Path | None, *, n_rows: int | None = None) -> Engine:
    """The engine that the configuration names, with one variant loaded.

    ``n_rows`` is how much work is coming, where it is known; an engine may serve much of it in another way.
    """
    if config.api is not None:
        return _open_api(config)
    if base is None:
        raise UserError(f"engine {config.name} needs the folder of a base model.")
    if config.name == "vllm":
        return _open_vllm(config, base, adapter, n_rows)
    return _open_torch(config, base, adapter)
