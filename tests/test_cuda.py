"""On an NVIDIA GPU, and skipped elsewhere: what the CPU's tests can only pretend. `pytest -m cuda` runs these alone.

Meant for compute capability 8 and above (RTX 3090, H100); what needs more or other programs says so.
"""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from processes import Training
from small_engine import KINDS, make_model, make_prompts
from small_runs import TEXTS, chat, read_log, write_rows

from model import attention
from model.attention import document_attention, document_bounds, plain_attention, visible_keys
from model.functional import Normalise, can_group, each_expert, grouped_experts, rms_norm
from model.generation import Engine, Request
from model.LMConfig import MiniMindConfig
from model.model_minimind import FeedForward, MiniMindForCausalLM
from trainer import train_full_sft, train_pretrain
from trainer.runtime.checkpoint import read_whole, same_bits
from trainer.runtime.engine import Engine as TrainingEngine
from trainer.runtime.engine import missing_for_compile
from trainer.runtime.steps import collate

pytestmark = pytest.mark.cuda
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before --deterministic sets it
CUDA = torch.device("cuda", 0)
TINY = ["--hidden_size=128", "--num_hidden_layers=2", "--device=cuda", "--log_interval=1", "--max_seq_len=64"]
TINY += ["--batch_size=4", "--from_weight=none", "--use_compile=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "pretrain.jsonl", [{"text": text} for text in TEXTS * 3])
    write_rows(folder / "full_sft.jsonl", [chat(f"Question {i}?", f"Answer {i}, " * (1 + i % 5)) for i in range(60)])
    return folder


@pytest.fixture(autouse=True)
def as_before():
    """--deterministic holds for the process, and so for the tests to come."""
    yield
    torch.use_deterministic_algorithms(False)


def train(script, data, out_dir, *flags):
    stage = script.__name__.split("train_")[1]
    script.main(script.parse_args([*TINY, f"--data_path={data / stage}.jsonl", f"--out_dir={out_dir}", *flags]))
    return read_log(out_dir, script)


def losses(log):
    return [line["loss"] for line in log]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("script", [train_pretrain, train_full_sft], ids=lambda script: script.__name__)
def test_a_gpu_learns_what_a_cpu_learns(script, data, tmp_path):
    flags = ["--dtype=float32", "--max_steps=6"]
    expected = train(script, data, tmp_path / "cpu", *flags, "--device=cpu")
    found = train(script, data, tmp_path / "cuda", *flags)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
    rough = train(script, data, tmp_path / "half", "--max_steps=6", "--dtype=bfloat16")
    assert losses(rough) == pytest.approx(losses(expected), rel=0.02)


def end_in_step(monkeypatch, number):
    """A run that breaks off in its number-th step."""
    update, calls = TrainingEngine.update, []

    def broken(self, max_norm):
        calls.append(1)
        update(self, max_norm if len(calls) < number else 1 / 0)

    monkeypatch.setattr(TrainingEngine, "update", broken)


@pytest.mark.parametrize("flags", [[], ["--use_moe"], ["--optimizer=adamw"]], ids=str)
def test_a_deterministic_run_resumes_to_the_bit(flags, data, tmp_path, monkeypatch):
    flags = [*flags, "--deterministic", "--dtype=bfloat16", "--save_interval=3", "--max_steps=8"]
    train(train_pretrain, data, tmp_path / "whole", *flags)
    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
        end_in_step(context, 6)
        train(train_pretrain, data, tmp_path / "parts", *flags)
    train(train_pretrain, data, tmp_path / "parts", *flags, "--from_resume=1")
    same_bits(read_whole(tmp_path / "whole"), read_whole(tmp_path / "parts"))


def test_float16_scales_its_losses_and_resumes(data, tmp_path):
    """From a float16 run, and from a bfloat16 one, which has no scale."""
    for before in "float16", "bfloat16":
        out_dir = tmp_path / before
        train(train_pretrain, data, out_dir, f"--dtype={before}", "--max_steps=4")
        log = train(train_pretrain, data, out_dir, "--dtype=float16", "--max_steps=8", "--from_resume=1")
        assert [line["step"] for line in log] == list(range(1, 9))
        assert all(line["loss"] is not None for line in log)
        (path,) = (out_dir / "checkpoints").iterdir()
        scaler = torch.load(path, weights_only=True)["engines"]["model"]["scaler"]
        assert scaler["scale"] > 1


@pytest.mark.skipif(missing_for_compile(CUDA) is not None, reason=f"needs {missing_for_compile(CUDA)}")
def test_a_compiled_run_has_the_same_losses(data, tmp_path):
    flags = ["--dtype=bfloat16", "--max_steps=6"]
    expected = train(train_pretrain, data, tmp_path / "eager", *flags)
    torch.compiler.reset()
    found = train(train_pretrain, data, tmp_path / "compiled", *flags, "--use_compile=1")
    assert losses(found) == pytest.approx(losses(expected), rel=0.02)
    torch.compiler.reset()


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="with a card for each they would not share one")
def test_two_processes_share_a_card(data, tmp_path):
    """NCCL refuses that; gloo gives the losses of one process."""
    flags = ["--device=cuda:0", "--dtype=float32", "--max_steps=4", f"--data_path={data / 'pretrain.jsonl'}"]
    expected = train(train_pretrain, data, tmp_path / "one", *flags, "--batch_size=4")
    more = [f"--out_dir={tmp_path / 'two'}", "--batch_size=2"]
    run = Training("pretrain", [*TINY, *flags, *more], tmp_path / "rank", ranks=2)
    assert run.wait() == [0, 0], run.err()
    log = [json.loads(line) for line in (tmp_path / "two/logs/pretrain_128.jsonl").read_text().splitlines()]
    assert losses(log) == pytest.approx(losses(expected), rel=1e-4)
    assert torch.equal(run.weights(0), run.weights(1))


# ------------------------------------------------------------------------------------------------------------- kernels


def needs_varlen():
    if attention.varlen_attn is None or not torch.backends.cuda.is_flash_attention_available():
        pytest.skip("this build of torch has no flash attention")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 2, 64), (4, 4, 96), (8, 4, 192)])
def test_attention_by_documents_equals_the_mask(heads, shared, width, dtype):
    """One kernel for all documents, heads shared: values and gradients, against float32 over the mask."""
    needs_varlen()
    mask = torch.tensor([[1] * 5 + [2] * 40 + [3] * 19, [1] * 60 + [0] * 4], device=CUDA)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, n, width, device=CUDA) for n in (heads, shared, shared))
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*(x.transpose(1, 2) for x in exact), visible_keys(mask, 64), False, 0.0).transpose(1, 2)
    rough = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = document_attention(*rough, document_bounds(mask), 0.0, by_kernel=True)
    real = mask > 0
    torch.testing.assert_close(out[real].float(), expected[real], atol=0.03, rtol=0.03)
    for x in out, expected:
        (x.float() * real[..., None, None]).square().sum().backward()
    for a, b in zip(rough, exact, strict=True):
        assert (a.grad.float() - b.grad).norm() < 0.03 * b.grad.norm()


def test_a_packed_row_equals_its_documents_apart():
    needs_varlen()
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=256, num_hidden_layers=2)).to(CUDA)
    ids = torch.randint(3, 6400, (1, 48), device=CUDA)
    mask = torch.tensor([[1] * 20 + [2] * 28], device=CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        packed = model(ids, attention_mask=mask, labels=ids).token_losses
        apart = [model(part, labels=part).token_losses for part in ids.split([20, 28], dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=0.05, rtol=0.02)


def test_grouped_experts_equal_them_one_by_one():
    """An expert without tokens among them. Grouped where there is a kernel for it, capability 9."""
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=128, use_moe=True)
    experts = torch.nn.ModuleList(FeedForward(config) for _ in range(4)).to(CUDA)
    counts = torch.tensor([30, 0, 17, 53], device=CUDA)
    x = torch.randn(100, 128, device=CUDA).bfloat16()
    assert can_group(x, experts[0].gate_proj.weight) == (torch.cuda.get_device_capability() >= (9, 0))
    results = []
    for run in each_expert, grouped_experts:
        own = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = run(experts, own, counts)
        grads = torch.autograd.grad(out.float().square().sum(), [own, *experts.parameters()])
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * a.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_in_one_kernel_equals_the_formula(dtype):
    torch.manual_seed(0)
    x, grad = (torch.randn(4, 33, 512, device=CUDA) * 3 for _ in range(2))
    weight = torch.rand(512, device=CUDA) + 0.5
    results = []
    for norm in rms_norm, lambda x, w, eps: Normalise.apply(x, w, eps, dtype):
        inputs = [each.clone().requires_grad_() for each in (x, weight)]
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = norm(*inputs, 1e-5)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(dtype))])
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a.float(), b.float(), **(close if a.shape == x.shape else {"atol": 0.5, "rtol": 0.02})
        )


def test_losses_at_targets_alone_wait_for_nothing():
    """With the indices of the batch at hand, a forward and a backward do not wait for the GPU."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=256, num_hidden_layers=2)).to(CUDA)
    ids = torch.randint(3, 6400, (2, 64))
    rows = [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]
    for row in rows:
        row["labels"][:40] = -100
    batch = {name: x.to(CUDA) for name, x in collate(rows).items()}
    with torch.autocast("cuda", torch.bfloat16):
        model(**batch, return_logits=False).loss.backward()  # libraries set themselves up
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = model(**batch, return_logits=False).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
        torch.testing.assert_close(loss, model(**plain, return_logits=False).loss, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ decoding


def replies(model, **keys):
    requests = [Request(prompt, temperature=0, max_new_tokens=90, stop_ids=()) for prompt in make_prompts(5, 33, 1)]
    engine = Engine(model, max_batch=3, prefill_chunk=16, **keys)
    return engine, [result.ids for result in engine.generate(requests)]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_give_the_replies_of_the_cpu(kind):
    """Sequences that leave, a cache that grows; then other weights at the same addresses, and nothing recorded anew."""
    model = make_model(half=False, **KINDS[kind])
    _, expected = replies(model)
    engine, found = replies(model.to(CUDA))
    assert found == expected and engine.decoder.graphs
    graphs = dict(engine.decoder.graphs)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    engine.refresh()
    request = Request(make_prompts(5)[0], temperature=0, max_new_tokens=30, stop_ids=())
    found = engine.generate([request])[0].ids
    assert graphs.items() <= engine.decoder.graphs.items()
    assert found == Engine(model.cpu()).generate([request])[0].ids


def test_steps_are_recorded_while_a_thread_pins_memory():
    loader = torch.utils.data.DataLoader(torch.randn(4000, 512), batch_size=4, pin_memory=True)
    model = make_model().to(CUDA)
    batches = iter(loader)
    next(batches)  # its thread runs
    for _ in range(3):
        replies(model)
        for _ in range(200):
            next(batches).to(CUDA, non_blocking=True)


def test_a_decoder_in_bfloat16_follows_the_float32_weights():
    model = make_model().to(CUDA)
    (prompt,) = make_prompts(40)
    exact = model(torch.tensor([prompt], device=CUDA)).logits[0, -1]
    engine = Engine(model, dtype=torch.bfloat16)
    assert engine.decoder.dtype == torch.bfloat16
    request = Request(prompt, max_new_tokens=1, temperature=1, seed=1, top_logprobs=1000)
    ((best, logprob), *_) = engine.generate([request])[0].top_logprobs[0]
    assert logprob == pytest.approx(F.log_softmax(exact, -1)[best].item(), abs=0.3)


def test_a_deterministic_process_draws():
    """cumsum of floats, which CUDA has no deterministic form of."""
    torch.use_deterministic_algorithms(True)
    request = Request(make_prompts(5)[0], max_new_tokens=10, temperature=1, top_p=0.9, seed=3, stop_ids=())
    first, second = (Engine(make_model().to(CUDA)).generate([request])[0].ids for _ in range(2))
    assert first == second
