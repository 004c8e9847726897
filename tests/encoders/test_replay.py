"""Recorded passes, with a device that records and replays torch's operations on the CPU in the place of a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow


class Device:
    """What torch.cuda is asked for. `stream` is the current one; `refuses` lets every recording fail."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        self.stream, self.refuses, self.recorded, self.replayed = 1, False, 0, 0
        device = self

        class Graph(TorchDispatchMode):
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                self.calls: list[tuple[Any, ...]] = []
                device.recorded += 1
                self.__enter__()

            def capture_end(self) -> None:
                self.__exit__(None, None, None)

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if device.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing\nsee CUDA's documents")
                result = func(*args, **(kwargs or {}))
                self.calls.append((func, args, kwargs or {}, result))
                return result

            def replay(self) -> None:
                device.replayed += 1
                for func, args, kwargs, result in self.calls:
                    result.copy_(func(*args, **kwargs))

        self.CUDAGraph = Graph

    def current_stream(self, device: Any) -> Any:
        return SimpleNamespace(cuda_stream=self.stream)

    def graph_pool_handle(self) -> Any:
        return object()

    def synchronize(self, device: Any) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Device:
    import torch

    device = Device()
    for name in ("CUDAGraph", "current_stream", "graph_pool_handle", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    return device


def double(batch: Any) -> Any:
    return (batch.float() * 2).sum(1)


def test_each_shape_is_recorded_once_for_each_stream_and_replayed(cuda: Device) -> None:
    import torch

    from clip_batch.encoders.replay import Replay

    run = Replay(double, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    kept = []
    for number in range(12):
        cuda.stream = number % 2
        batch = torch.randint(0, 255, (3 + number % 3, 5), generator=draw, dtype=torch.uint8)
        kept.append((run(batch), double(batch)))
    assert all(torch.equal(found, wanted) for found, wanted in kept), "a later replay overwrote rows"
    assert (cuda.recorded, cuda.replayed) == (6, 12)


def test_the_axes_of_a_batch_may_lie_otherwise_in_memory(cuda: Device) -> None:
    import torch

    from clip_batch.encoders.replay import Replay

    run = Replay(double, torch.device("cpu"))
    batch = torch.arange(24.0).reshape(2, 3, 4)
    for other in (batch, batch.permute(1, 2, 0).contiguous().permute(2, 0, 1), batch.flip(0)):
        assert torch.equal(run(other), double(other))
    assert cuda.recorded == 1


def test_what_cannot_be_recorded_runs_as_it_is(cuda: Device) -> None:
    import torch

    from clip_batch.encoders.replay import Replay

    run = Replay(double, torch.device("cpu"))
    cuda.refuses = True
    batch = torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"launched piece by piece, and slower: .*not permitted[^\n]*$"):
        assert torch.equal(run(batch), double(batch))
    assert torch.equal(run(2 * batch), double(2 * batch))
    assert (cuda.recorded, cuda.replayed) == (1, 0)


def test_texts_are_replayed_in_chunks_of_one_size(cuda: Device) -> None:
    import torch

    from clip_batch.encoders import text_tower
    from clip_batch.encoders.embedded import model_path
    from clip_batch.encoders.families import open_clip
    from clip_batch.encoders.replay import Replay

    model, _, tokenizer = open_clip.load_model(f"local-dir:{model_path()}", "", "fp32", torch.device("cpu"))
    tower = text_tower.TrimmedTextTower(model)
    texts = [" ".join(["word"] * (number % 7)) for number in range(61)]
    with torch.inference_mode():
        wanted = tower(tokenizer(texts))
        tower._chunk, tower._replay = 16, Replay(tower._run, torch.device("cpu"))
        for count in (61, 30, 16, 9, 7, 1):
            found = tower(tokenizer(texts[:count]))
            assert torch.allclose(found, wanted[:count], atol=1e-5)
    assert (cuda.recorded, cuda.replayed) == (1, 4 + 2 + 1 + 1)
