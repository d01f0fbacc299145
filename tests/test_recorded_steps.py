"""Steps recorded as CUDA graphs and the weights that they read, with a recorder and a GPU that are not there."""

import pytest
import torch
from pretended_cuda import PretendedCuda
from small_engine import KINDS, make_model, make_prompts

from model import decoder
from model.decoder import Decoder, tensors_of
from model.generation import Engine, Request


class Recorder:
    """Runs a step again as a CUDA graph would: from the memory that it read when it was recorded."""

    def __init__(self):
        self.records = 0

    def __call__(self, run, device, pool):
        self.records += 1
        arranged, result = run.func.__self__, run()
        read = [arranged.cache, arranged.cos, arranged.sin, *tensors_of(arranged.weights)]
        inputs = [x.untyped_storage().data_ptr() for x in run.args if isinstance(x, torch.Tensor)]
        assert len(inputs) == 3

        def again():
            kept = [buffer.untyped_storage().data_ptr() for buffer, *_ in arranged.graphs.values()]
            assert set(inputs) <= set(kept), "a graph keeps addresses: it would read freed memory"
            now = [arranged.cache, arranged.cos, arranged.sin, *tensors_of(arranged.weights)]
            assert all(a is b for a, b in zip(read, now, strict=True)), "a graph would read what is no longer there"
            result.copy_(run())

        return again, result


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(decoder, "record", recorder)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return recorder


def replies(engine):
    requests = [Request(prompt, temperature=0, max_new_tokens=40, stop_ids=()) for prompt in make_prompts(5, 9)]
    return [result.ids for result in engine.generate(requests)]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_outlive_new_weights(kind, recorder):
    """After an optimizer step: the same addresses, the new numbers, nothing recorded anew."""
    model, other = (make_model(half=False, **KINDS[kind]) for _ in range(2))
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    expected = [replies(Engine(m)) for m in (model, other)]
    assert expected[0] != expected[1]
    with PretendedCuda():
        engine = Engine(model)
        assert engine.decoder.graphed and replies(engine) == expected[0]
        records = recorder.records
        model.load_state_dict(other.state_dict())
        assert replies(engine) == expected[0]  # the weights are the decoder's own
        engine.refresh()
        assert replies(engine) == expected[1] and recorder.records == records > 0


def test_recorded_steps_end_with_their_cache(recorder):
    """A longer sequence makes the cache grow: what was recorded read the former one."""
    with PretendedCuda():
        engine = Engine(make_model())
        short, long = (Request(make_prompts(3)[0], temperature=0, max_new_tokens=n, stop_ids=()) for n in (20, 150))
        engine.generate([short])
        records = recorder.records
        found = engine.generate([long])[0].ids
        assert recorder.records > records
        assert engine.generate([short])[0].ids == found[:20]
    assert found == Engine(make_model()).generate([long])[0].ids


def test_a_dtype_of_the_decoder(recorder):
    """Trained weights are float32; a GPU reads half as much in bfloat16, experts' router and norms in float32."""
    model = make_model(use_moe=True)
    (prompt,) = make_prompts(30)
    exact = model(torch.tensor([prompt])).logits[0, -1]
    with PretendedCuda(), torch.inference_mode():
        arranged = Decoder(model, None, torch.bfloat16)
        arranged.reserve(1, 30)
        assert arranged.cache.dtype == torch.bfloat16
        routers = [layer.mlp.gate for layer in arranged.layers]
        assert {x.dtype for x in routers} == {torch.float32}
        others = [x for x in tensors_of(arranged.weights) if not any(x is router for router in routers)]
        assert {x.dtype for x in others} == {torch.bfloat16}
        logits = arranged(prompt, [0] * 30, list(range(30)), 0, [decoder.Segment(0, 0, 30)])[0]
    assert torch.nn.functional.cosine_similarity(logits.float(), exact, dim=0) > 0.99
    assert Decoder(model, None, torch.bfloat16).dtype == torch.float32  # sums on a CPU


def test_graphs_share_a_pool_and_let_other_threads_be(monkeypatch):
    """A loader's thread pins memory, NCCL's watches: neither may end a recording."""
    calls = []

    class Context:
        def __init__(self, *args, **keys):
            calls.append((args, keys))

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def wait_stream(self, stream): ...

        def replay(self): ...

    for name in "device", "Stream", "stream", "CUDAGraph", "graph":
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "current_stream", Context)
    decoder.record(lambda: torch.ones(1), torch.device("cuda", 1), (0, 7))
    assert calls[0] == ((torch.device("cuda", 1),), {})
    assert calls[-1][1] == {"pool": (0, 7), "capture_error_mode": "thread_local"}
